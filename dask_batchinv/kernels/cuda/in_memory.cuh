// What kernels have in common that have one matrix per block, of any size, in global memory.

constexpr int SIDE = 16;  // blocks have SIDE rows of SIDE threads
constexpr int THREADS = SIDE * SIDE;
// The first bytes of shared memory, which are `over_block`'s.
constexpr int SCRATCH = THREADS / 32 * 8;

// Over all threads of a block.
template <class V, class Join> static __device__ V over_block(V value, Join join) {
    V* const scratch = (V*)memory;
    for (int far = 16; far; far /= 2) value = join(value, (V)__shfl_xor_sync(ALL, value, far, 32));
    __syncthreads();  // others may still read what stood there
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[0];
    for (int w = 1; w < THREADS / 32; w++) value = join(value, scratch[w]);
    return value;
}

// Calls `work(i, j)` for every number of a matrix, so that neighbours fall to neighbours.
template <class Work> static __device__ void for_each(int n, Work work) {
    for (int i = threadIdx.x / 32; i < n; i += THREADS / 32)
        for (int j = threadIdx.x % 32; j < n; j += 32) work(i, j);
}

// The largest sum of a column: of what `plus(i, j, sum)` makes of a sum.
template <class Plus> static __device__ R largest_column(int n, Plus plus) {
    R largest = 0;
    for (int j = threadIdx.x; j < n; j += THREADS) {
        R sum = 0;
        for (int i = 0; i < n; i++) sum = plus(i, j, sum);
        largest = larger(largest, sum);
    }
    return over_block(largest, larger);
}

// What is known of a matrix before it is inverted.
struct Measured {
    int finite, shift, excess;
    R norm;
};

template <class Get> static __device__ Measured measure(int n, Get get) {
    Range range;
    for_each(n, [&](int i, int j) { range.look(given(i, j, get)); });
    range.most = over_block(range.most, [](Word a, Word b) { return max(a, b); });
    range.least = over_block(range.least, [](Word a, Word b) { return min(a, b); });
    const R scale = F::power(range.shift()), by = F::power(-range.excess() - SLACK);
    const R norm = largest_column(
        n, [&](int i, int j, R sum) { return plus_magnitude(times(given(i, j, get), scale), by, sum); });
    return {range.finite(), range.shift(), range.excess(), norm};
}

// Turns the inverse of what was worked on, in x, into that of the matrix, in its place, and accounts for it.
static __device__ void finish(Long q, int n, Measured measured, int pivot, T* x, int* info, R* rconds,
                              Word* overflows) {
    const auto get = [&](int i, int j) { return x[(Long)i * n + j]; };
    const R scale = F::power(measured.shift);
    Norm of_inverse(measured.excess);
    for (int pass = 0;; pass++) {
        const R by = of_inverse.factor();
        const R norm =
            largest_column(n, [&](int i, int j, R sum) { return plus_magnitude(found(i, j, get), by, sum); });
        if (!of_inverse.again(norm, pass)) break;
    }
    int overflow = 0;
    if (of_inverse.may_overflow(measured.excess, measured.shift)) {
        for_each(n, [&](int i, int j) { overflow |= !is_finite(scaled(found(i, j, get), scale)); });
        overflow = over_block(overflow, [](int a, int b) { return a | b; });
    }
    const int code = info_of(measured.finite, pivot, overflow);
    if (threadIdx.x == 0)
        report(q, code, rcond_of(measured.finite, pivot, measured.norm, of_inverse), info, rconds, overflows);
    const R by = code ? F::not_a_number() : scale;
    __syncthreads();
    for_each(n, [&](int i, int j) {
        if (i > j) return;  // two numbers at a time, each of which may depend on both
        const T upper = scaled(found(i, j, get), by), lower = scaled(found(j, i, get), by);
        x[(Long)j * n + i] = lower;
        x[(Long)i * n + j] = upper;
    });
}
