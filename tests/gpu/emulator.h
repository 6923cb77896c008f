// Runs a CUDA kernel on a CPU, so that its arithmetic and its barriers can be tested without a card: the threads of a
// block are fibers, switched at barriers alone. A barrier that some threads of a group never reach ends the process.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

// Without these, C's functions would take floats as doubles.
using std::fabs;
using std::fma;
using std::max;
using std::min;
using std::sqrt;
static_assert(sizeof(fabs(1.f)) == 4 && sizeof(fma(1.f, 1.f, 1.f)) == 4 && sizeof(sqrt(1.f)) == 4, "not as on a card");

namespace emulator {

enum Wait { NOTHING, WARP, BLOCK };

struct Index {
    unsigned x;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    Index index;
    Wait waits = NOTHING;
    const void* where = nullptr;  // in the code it waits
    bool ended = false;
    unsigned char slot[16];
};

std::vector<Fiber> fibers;
Fiber* self;
ucontext_t scheduler;
Index block, grid, size;
std::function<void()> body;

void run_fiber() {
    body();
    self->ended = true;
    swapcontext(&self->context, &scheduler);
}

void wait(Wait kind, const void* where) {
    self->waits = kind;
    self->where = where;
    swapcontext(&self->context, &scheduler);
}

// Lets the threads of [first, last) go on if all of them that have not ended wait for each other.
bool release(size_t first, size_t last, Wait kind) {
    bool some = false;
    const void* where = nullptr;
    for (size_t t = first; t < last; t++) {
        if (fibers[t].ended) continue;
        if (fibers[t].waits != kind) return false;
        if (some && kind == WARP && fibers[t].where != where) {
            std::fprintf(stderr, "lanes of a warp exchange values in different places of the code\n");
            std::abort();
        }
        some = true;
        where = fibers[t].where;
    }
    for (size_t t = first; t < last; t++) fibers[t].waits = NOTHING;
    return some;
}

void run_block(unsigned threads) {
    if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
    for (unsigned t = 0; t < threads; t++) {
        Fiber& fiber = fibers[t];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
        fiber.index = {t};
        fiber.waits = NOTHING;
        fiber.ended = false;
    }
    for (bool backwards = false;; backwards = !backwards) {  // no order is promised, and none must matter
        bool moved = false, all_ended = true;
        for (unsigned t = 0; t < threads; t++) {
            Fiber& fiber = fibers[backwards ? threads - 1 - t : t];
            if (!fiber.ended && fiber.waits == NOTHING) {
                self = &fiber;
                swapcontext(&scheduler, &fiber.context);
                moved = true;
            }
            all_ended &= fiber.ended;
        }
        if (all_ended) return;
        for (unsigned t = 0; t < threads; t += 32) moved |= release(t, min(t + 32, threads), WARP);
        if (!moved && !release(0, threads, BLOCK)) {
            std::fprintf(stderr, "some threads wait at a barrier that others never reach\n");
            std::abort();
        }
    }
}

template <class V> __attribute__((noinline)) V exchanged(V value, unsigned from) {
    const void* const where = __builtin_return_address(0);
    static_assert(sizeof(V) <= sizeof(self->slot));
    std::memcpy(self->slot, &value, sizeof(V));
    wait(WARP, where);
    V other;
    std::memcpy(&other, fibers[from].slot, sizeof(V));
    wait(WARP, where);
    return other;
}

}  // namespace emulator

#define threadIdx (emulator::self->index)
#define blockIdx (emulator::block)
#define blockDim (emulator::size)
#define gridDim (emulator::grid)

inline void __syncthreads() { emulator::wait(emulator::BLOCK, nullptr); }
__attribute__((noinline)) void __syncwarp() { emulator::wait(emulator::WARP, __builtin_return_address(0)); }
template <class V> V __shfl_sync(unsigned, V value, int lane, int width) {
    const unsigned t = threadIdx.x;
    return emulator::exchanged(value, t - t % width + lane % width);
}
template <class V> V __shfl_xor_sync(unsigned, V value, int mask, int) {
    return emulator::exchanged(value, threadIdx.x ^ mask);
}
template <class V, class Join> V reduced(V value, Join join) {
    for (int far = 16; far; far /= 2) value = join(value, emulator::exchanged(value, threadIdx.x ^ far));
    return value;
}
inline int __any_sync(unsigned, int value) {
    return reduced(value != 0, [](int a, int b) { return a | b; });
}
inline unsigned atomicAdd(unsigned* at, unsigned value) {
    const unsigned old = *at;
    *at += value;
    return old;
}

template <class To, class From> To same_bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}
inline unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
inline int __double2hiint(double value) { return same_bits<long long>(value) >> 32; }
inline int __double2loint(double value) { return same_bits<long long>(value); }
inline double __hiloint2double(int high, int low) {
    return same_bits<double>((long long)((unsigned long long)(unsigned)high << 32 | (unsigned)low));
}

#include KERNELS

__align__(16) unsigned char memory[1 << 18];

template <class Kernel, class... Arguments>
static void launch(Kernel kernel, unsigned blocks, unsigned threads, unsigned shared, Arguments... arguments) {
    emulator::body = [=] { kernel(arguments...); };
    emulator::grid = {blocks};
    emulator::size = {threads};
    for (unsigned b = 0; b < blocks; b++) {
        // What it has at the beginning is not promised, and beyond its end it is not there.
        std::memset(memory, 0xff, sizeof memory);
        emulator::block = {b};
        emulator::run_block(threads);
        for (size_t i = shared; i < sizeof memory; i++)
            if (memory[i] != 0xff) {
                std::fprintf(stderr, "%u bytes of shared memory were asked for, byte %zu was written\n", shared, i);
                std::abort();
            }
    }
}

// The kernels as functions for others to call: `run_NAME(blocks, threads, shared, arguments of the kernel)`.
template <auto kernel> struct Run;
template <class... Arguments, void (*kernel)(Arguments...)> struct Run<kernel> {
    static void run(unsigned blocks, unsigned threads, unsigned shared, Arguments... arguments) {
        launch(kernel, blocks, threads, shared, arguments...);
    }
};
#define EXPORT(name) extern "C" { void* run_##name = (void*)Run<name>::run; }
EXPORTS
