// The inverse of every matrix in a stack, with an account of each: the contract is in kernels/__init__.py.
//
// Compiled for one dtype, size and kind of matrix at a time:
//
//     NUMBER     float, double, Complex<float> or Complex<double>
//     N          the size of the matrices; for `per_block` a multiple of SIDE that is not less
//     DEFINITE   1 for positive definite matrices, else 0
//     WARPS      warps of a block of `per_warp`
//     INFO_…     the codes of Info in outcome.py
//
// Four layouts share the work. All eliminate by Gauss-Jordan in place: general matrices with partial pivoting, rows
// never exchanged in memory; positive definite ones without, from the upper triangle alone, whose pivots are those of
// Cholesky's factorization.
//
//     per_thread one matrix per thread, in its registers
//     per_warp   one row per lane of a warp, in registers; several matrices per warp where they are small
//     per_block  one matrix per block: a tile of it in the registers of each thread
//     memory     one matrix per block, of any size, in global memory; and the ends of what cuBLAS does between
//
// Every matrix is brought to unit size by a power of two first, and its inverse back by the same, as on the CPU.

typedef long long Long;

// --- numbers ----------------------------------------------------------------------------------------------------

template <class R> struct alignas(2 * sizeof(R)) Complex {
    R re, im;
};

template <class T> struct RealOf {
    typedef T type;
};
template <class R> struct RealOf<Complex<R>> {
    typedef R type;
};

typedef NUMBER T;
typedef RealOf<T>::type R;

template <class R> struct Format;
template <> struct Format<float> {
    static constexpr int lowest = -125;  // the exponent of the smallest normal number, mantissas in [1/2, 1)
    static constexpr float largest = 3.402823466e+38f;
    static constexpr float epsilon = 1.1920928955078125e-7f;
    static __device__ float power(int k) { return __int_as_float((k + 127) << 23); }
};
template <> struct Format<double> {
    static constexpr int lowest = -1021;
    static constexpr double largest = 1.7976931348623157e+308;
    static constexpr double epsilon = 2.220446049250313e-16;
    static __device__ double power(int k) { return __longlong_as_double((Long)(k + 1023) << 52); }
};

static __device__ R not_a_number() { return Format<R>::largest * 2 - Format<R>::largest * 2; }

// What differs between real and complex numbers.
static __device__ R part(R a, int) { return a; }
static __device__ R part(Complex<R> a, int k) { return k ? a.im : a.re; }
static __device__ R join(R re, R, R*) { return re; }
static __device__ Complex<R> join(R re, R im, Complex<R>*) { return {re, im}; }
constexpr int PARTS = sizeof(T) / sizeof(R);

static __device__ T number(R re, R im = 0) { return join(re, im, (T*)0); }
static __device__ R real(T a) { return part(a, 0); }
static __device__ R conj(R a) { return a; }
static __device__ Complex<R> conj(Complex<R> a) { return {a.re, -a.im}; }
static __device__ R minus(R a) { return -a; }
static __device__ Complex<R> minus(Complex<R> a) { return {-a.re, -a.im}; }
static __device__ R times(R a, R b) { return a * b; }
static __device__ Complex<R> times(Complex<R> a, R b) { return {a.re * b, a.im * b}; }
static __device__ Complex<R> times(Complex<R> a, Complex<R> b) {
    return {fma(a.re, b.re, -a.im * b.im), fma(a.re, b.im, a.im * b.re)};
}
static __device__ R mean(R a, R b) { return a * R(0.5) + b * R(0.5); }
static __device__ Complex<R> mean(Complex<R> a, Complex<R> b) { return {mean(a.re, b.re), mean(a.im, b.im)}; }

// a - b c
static __device__ R less_product(R a, R b, R c) { return fma(-b, c, a); }
static __device__ Complex<R> less_product(Complex<R> a, Complex<R> b, Complex<R> c) {
    return {fma(b.im, c.im, fma(-b.re, c.re, a.re)), fma(-b.im, c.re, fma(-b.re, c.im, a.im))};
}
static __device__ Complex<R> less_product(Complex<R> a, R b, Complex<R> c) {
    return {fma(-b, c.re, a.re), fma(-b, c.im, a.im)};
}

static __device__ R reciprocal(R a) { return R(1) / a; }
static __device__ Complex<R> reciprocal(Complex<R> a) {
    // Smith's: neither overflows nor underflows on the way.
    if (fabs(a.re) >= fabs(a.im)) {
        const R ratio = a.im / a.re, divisor = fma(a.im, ratio, a.re);
        return {R(1) / divisor, -ratio / divisor};
    }
    const R ratio = a.re / a.im, divisor = fma(a.re, ratio, a.im);
    return {ratio / divisor, R(-1) / divisor};
}

static __device__ R magnitude(R a) { return fabs(a); }
static __device__ R magnitude(Complex<R> a) { return hypot(a.re, a.im); }

// What pivots are chosen by, as LAPACK does. NaN counts as infinite: then the result overflows, as it should.
static __device__ R weight(T a) {
    const R w = PARTS == 2 ? fabs(part(a, 0)) + fabs(part(a, 1)) : fabs(real(a));
    return w == w ? w : Format<R>::largest * 2;
}

static __device__ bool unfit(T pivot) {
    return DEFINITE ? !(real(pivot) > 0) : part(pivot, 0) == 0 && part(pivot, PARTS - 1) == 0;
}

// The larger of two sums of magnitudes; NaN is the largest of all, so that it is not lost.
static __device__ R larger(R a, R b) { return a > b || a != a ? a : b; }

// --- scaling ----------------------------------------------------------------------------------------------------

// Norms are smaller by so many powers of two than what they are of.
constexpr int SLACK = 32;

// The numbers of a matrix: the largest and the smallest, zeros not counted.
struct Range {
    R largest = 0, smallest = Format<R>::largest;
    int finite = 1;

    __device__ void look(T a) {
        for (int k = 0; k < PARTS; k++) {
            const R size = fabs(part(a, k));
            finite &= size <= Format<R>::largest;
            largest = fmax(largest, size);
            if (size > 0) smallest = fmin(smallest, size);
        }
    }
    // The exponent that brings the largest number into [1/2, 1), unless the smallest would become subnormal.
    __device__ int shift() const {
        if (largest == 0 || !finite) return 0;
        int of_largest, of_smallest;
        frexp(largest, &of_largest);
        frexp(smallest, &of_smallest);
        return max(-of_largest, min(Format<R>::lowest - of_smallest, 0));
    }
    // The exponent that the largest number then still has, or most of it.
    __device__ int excess() const {
        if (largest == 0 || !finite) return 0;
        int of_largest;
        frexp(largest, &of_largest);
        return max(min(of_largest + shift(), -Format<R>::lowest - SLACK), 0);
    }
};

struct Scale {
    R first, second;
    explicit __device__ Scale(int shift) {
        const int near = min(max(shift, Format<R>::lowest), 1 - Format<R>::lowest);
        first = Format<R>::power(near);
        second = Format<R>::power(shift - near);
    }
    // Every zero of the result is positive.
    __device__ R operator()(R a) const { return fma(a * first, second, R(0)); }
    __device__ Complex<R> operator()(Complex<R> a) const { return {(*this)(a.re), (*this)(a.im)}; }
};

// Magnitudes for a norm: of the matrix without its excess, of the inverse with it, and both smaller by SLACK, so that
// no sum overflows unless rcond is 0.
struct Magnitude {
    R factor;
    explicit __device__ Magnitude(int excess) : factor(Format<R>::power(excess - SLACK)) {}
    __device__ R operator()(T a) const { return magnitude(times(a, factor)); }
};

static __device__ bool is_finite(T a) {
    return fabs(part(a, 0)) <= Format<R>::largest && fabs(part(a, PARTS - 1)) <= Format<R>::largest;
}

// --- structures -------------------------------------------------------------------------------------------------

enum Structure { GENERAL, SYMMETRIC, HERMITIAN, UPPER, LOWER, DIAGONAL };

// What a matrix is of which only the part is read that its structure names.
template <class Get> static __device__ T given(int structure, int i, int j, Get get) {
    switch (structure) {
        case SYMMETRIC: return i <= j ? get(i, j) : get(j, i);
        case HERMITIAN: return i == j ? number(real(get(i, i))) : i < j ? get(i, j) : conj(get(j, i));
        case UPPER: return i <= j ? get(i, j) : number(0);
        case LOWER: return i >= j ? get(i, j) : number(0);
        case DIAGONAL: return i == j ? get(i, i) : number(0);
        default: return get(i, j);
    }
}

// The matrix that is eliminated: of a lower triangular one the transpose, so that its pivots are its diagonal.
template <class Get> static __device__ T worked_on(int structure, int i, int j, Get get) {
    return structure == LOWER ? given(structure, j, i, get) : given(structure, i, j, get);
}

// The inverse, from that of what was worked on.
template <class Get> static __device__ T found(int structure, int i, int j, Get get) {
    switch (structure) {
        // Not one triangle for both: the error of an inverse is small as a whole, not that of its halves put together.
        case SYMMETRIC: return mean(get(i, j), get(j, i));
        case HERMITIAN: return DEFINITE ? given(structure, i, j, get) : mean(get(i, j), conj(get(j, i)));
        case LOWER: return i >= j ? get(j, i) : number(0);
        default: return given(structure, i, j, get);
    }
}

// --- the account ------------------------------------------------------------------------------------------------

static __device__ int info_of(int finite, int pivot, int overflow) {
    return !finite ? INFO_NOT_FINITE : pivot ? pivot : overflow ? INFO_OVERFLOW : 0;
}

static __device__ R rcond_of(int finite, int pivot, R norm, R norm_of_inverse) {
    // As cpu/scaling.py has it.
    const R one = Format<R>::epsilon * Format<R>::power(-2 * SLACK);
    const R rcond = one / (Format<R>::epsilon * norm * norm_of_inverse);
    return !finite ? not_a_number() : pivot || rcond != rcond ? R(0) : rcond;
}

static __device__ T failed() { return number(not_a_number(), not_a_number()); }

extern __shared__ __align__(16) unsigned char memory[];

// --- per_thread -------------------------------------------------------------------------------------------------

constexpr int THREADS = 64;  // of a block

#ifdef LAYOUT_PER_THREAD

constexpr int PITCH = N * N | 1;  // odd, so that the threads of a warp find their numbers in different banks

static __device__ void exchange(bool wanted, T& a, T& b) {
    const T old = a;
    a = wanted ? b : a;
    b = wanted ? old : b;
}

static __device__ int eliminate(T (&x)[N][N]) {
    int failed_pivot = 0, from[N];
#pragma unroll
    for (int k = 0; k < N; k++) {
        from[k] = k;
        if (!DEFINITE) {
            R best = weight(x[k][k]);
#pragma unroll
            for (int i = k + 1; i < N; i++) {
                const R w = weight(x[i][k]);
                if (w > best) best = w, from[k] = i;
            }
#pragma unroll
            for (int i = k + 1; i < N; i++)
#pragma unroll
                for (int j = 0; j < N; j++) exchange(from[k] == i, x[k][j], x[i][j]);
        }
        if (unfit(x[k][k]) && !failed_pivot) failed_pivot = k + 1;
        if (DEFINITE) {
            const R inverse = R(1) / real(x[k][k]);
            T line[N];
#pragma unroll
            for (int j = 0; j < N; j++) line[j] = j > k ? x[k][j] : minus(conj(x[j][k]));
#pragma unroll
            for (int i = 0; i < N; i++) {
                if (i == k) continue;
                const T factor = times(i < k ? x[i][k] : conj(line[i]), inverse);
#pragma unroll
                for (int j = i; j < N; j++)
                    if (j != k) x[i][j] = less_product(x[i][j], factor, line[j]);
                if (i < k) x[i][k] = minus(factor);
            }
#pragma unroll
            for (int j = k + 1; j < N; j++) x[k][j] = times(line[j], inverse);
            x[k][k] = number(inverse);
            continue;
        }
        const T inverse = reciprocal(x[k][k]);
#pragma unroll
        for (int j = 0; j < N; j++) x[k][j] = j == k ? inverse : times(x[k][j], inverse);
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (i == k) continue;
            const T factor = x[i][k];
            x[i][k] = number(0);
#pragma unroll
            for (int j = 0; j < N; j++) x[i][j] = less_product(x[i][j], factor, x[k][j]);
        }
    }
#pragma unroll
    for (int k = N - 1; k >= 0; k--)
#pragma unroll
        for (int j = k + 1; j < N; j++)
#pragma unroll
            for (int i = 0; i < N; i++) exchange(from[k] == j, x[i][k], x[i][j]);
    return failed_pivot;
}

// One matrix, in shared memory, by one thread.
static __device__ void invert_one(T* mine, int structure, int* info, R* rcond) {
    T x[N][N];
    Range range;
    const auto stored = [&](int i, int j) { return mine[i * N + j]; };
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int j = 0; j < N; j++) {
            x[i][j] = worked_on(structure, i, j, stored);
            range.look(x[i][j]);
        }
    const int shift = range.shift();
    const Scale scale(shift), back(shift);
    const Magnitude of_matrix(-range.excess()), of_inverse(range.excess());
    R norm = 0, norm_of_inverse = 0;
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int i = 0; i < N; i++) x[i][j] = scale(x[i][j]);
#pragma unroll
    for (int j = 0; j < N; j++) {
        R sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) sum += of_matrix(structure == LOWER ? x[j][i] : x[i][j]);
        norm = larger(norm, sum);
    }
    const int pivot = eliminate(x);
    int overflow = 0;
    const auto result = [&](int i, int j) { return x[i][j]; };
#pragma unroll
    for (int j = 0; j < N; j++) {
        R sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const T value = found(structure, i, j, result);
            sum += of_inverse(value);
            mine[i * N + j] = back(value);
            overflow |= !is_finite(mine[i * N + j]);
        }
        norm_of_inverse = larger(norm_of_inverse, sum);
    }
    *info = info_of(range.finite, pivot, overflow);
    *rcond = rcond_of(range.finite, pivot, norm, norm_of_inverse);
    if (*info)
        for (int e = 0; e < N * N; e++) mine[e] = failed();
}

extern "C" __global__ void __launch_bounds__(THREADS)
    per_thread(const T* a, T* out, int* info, R* rcond, Long m, int, int structure) {
    T* const staged = (T*)memory;
    for (Long first = (Long)blockIdx.x * THREADS; first < m; first += (Long)gridDim.x * THREADS) {
        const int count = (int)min((Long)THREADS, m - first);
        // Neighbours in memory by neighbouring threads.
        for (int e = threadIdx.x; e < count * N * N; e += THREADS)
            staged[e / (N * N) * PITCH + e % (N * N)] = a[first * N * N + e];
        __syncthreads();
        const int t = threadIdx.x;
        if (t < count) invert_one(staged + t * PITCH, structure, info + first + t, rcond + first + t);
        __syncthreads();
        for (int e = threadIdx.x; e < count * N * N; e += THREADS)
            out[first * N * N + e] = staged[e / (N * N) * PITCH + e % (N * N)];
        __syncthreads();
    }
}

#endif

// --- warps ------------------------------------------------------------------------------------------------------

constexpr unsigned ALL = 0xffffffff;

static __device__ R from_lane(R a, int lane, int width) { return __shfl_sync(ALL, a, lane, width); }
static __device__ Complex<R> from_lane(Complex<R> a, int lane, int width) {
    return {__shfl_sync(ALL, a.re, lane, width), __shfl_sync(ALL, a.im, lane, width)};
}

// Over groups of `width` lanes.
static __device__ Range merged(Range range, int width) {
    for (int far = width / 2; far; far /= 2) {
        range.largest = fmax(range.largest, __shfl_xor_sync(ALL, range.largest, far, width));
        range.smallest = fmin(range.smallest, __shfl_xor_sync(ALL, range.smallest, far, width));
        range.finite &= __shfl_xor_sync(ALL, range.finite, far, width);
    }
    return range;
}
static __device__ R largest_of(R a, int width) {
    for (int far = width / 2; far; far /= 2) a = larger(a, __shfl_xor_sync(ALL, a, far, width));
    return a;
}
static __device__ int any_of(int a, int width) {
    for (int far = width / 2; far; far /= 2) a |= __shfl_xor_sync(ALL, a, far, width);
    return a;
}

// --- per_warp ---------------------------------------------------------------------------------------------------

#ifdef LAYOUT_PER_WARP

constexpr int LANES = N <= 2 ? 2 : N <= 4 ? 4 : N <= 8 ? 8 : N <= 16 ? 16 : 32;  // of a matrix
constexpr int TOGETHER = 32 / LANES;                                            // matrices of a warp
constexpr int ROW = N | 1;  // the distance of rows in shared memory, odd against conflicts of banks

// The state of a lane: a row of its matrix, whose column k is at x[0] in step k.
struct Lane {
    T x[N];
    int row, pivot = 0, used = 0, step = 0;

    // The row of the next pivot.
    __device__ int choose(int k) {
        if (DEFINITE) return k;
        R best = row < N && !used ? weight(x[0]) : R(-1);
        int at = row;
        for (int far = LANES / 2; far; far /= 2) {
            const R other = __shfl_xor_sync(ALL, best, far, LANES);
            const int its = __shfl_xor_sync(ALL, at, far, LANES);
            if (other > best || (other == best && its < at)) best = other, at = its;
        }
        return at;
    }

    // `lines` has room for two rows of the matrix: one is read while the next is written.
    __device__ void eliminate(T* lines, int* order) {
#pragma unroll 1
        for (int k = 0; k < N; k++) {
            T* const line = lines + (k & 1) * ROW;
            const int p = choose(k);
            const T chosen = from_lane(x[0], p, LANES);
            if (unfit(chosen) && !pivot) pivot = k + 1;
            const T inverse = DEFINITE ? number(R(1) / real(chosen)) : reciprocal(chosen);
            T factor = x[0];
            const bool mine = row == p;
            // The columns are turned by one in each step: in line[j] is column (k + j) mod N.
            if (mine) {
                used = 1;
                step = k;
                order[k] = row;
            }
            if (DEFINITE) {
                if (mine)
#pragma unroll
                    for (int j = 1; j < N; j++)
                        if (j < N - k) line[j] = x[j];
                if (row < k) line[N - k + row] = minus(conj(x[0]));
                __syncwarp();
                if (row > k && row < N) factor = conj(line[row - k]);
                factor = times(factor, inverse);
                if (mine) factor = minus(inverse);
            } else {
                if (mine)
#pragma unroll
                    for (int j = 1; j < N; j++) line[j] = times(x[j], inverse);
                __syncwarp();
                if (mine) factor = number(-1);
            }
#pragma unroll
            for (int j = 1; j < N; j++) x[j - 1] = less_product(mine ? number(0) : x[j], factor, line[j]);
            x[N - 1] = DEFINITE ? minus(factor) : less_product(number(0), factor, inverse);
        }
        __syncwarp();
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    per_warp(const T* a, T* out, int* info, R* rcond, Long m, int, int structure) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, which = lane / LANES;
    T* const staged = (T*)memory + warp * TOGETHER * N * ROW;
    T* const mine = staged + which * N * ROW;
    int* const notes = (int*)((T*)memory + WARPS * TOGETHER * N * ROW) + warp * TOGETHER * (N + 2);
    int* const order = notes + which * (N + 2);
    const auto stored = [&](int i, int j) { return mine[i * ROW + j]; };

    const Long step = (Long)gridDim.x * WARPS * TOGETHER;
    for (Long first = ((Long)blockIdx.x * WARPS + warp) * TOGETHER; first < m; first += step) {
        const int count = (int)min((Long)TOGETHER, m - first);
        for (int e = lane; e < count * N * N; e += 32)
            staged[e / (N * N) * N * ROW + e % (N * N) / N * ROW + e % N] = a[first * N * N + e];
        __syncwarp();
        const int row = lane % LANES;
        const bool here = row < N;
        Lane state;
        state.row = row;
        Range range;
#pragma unroll
        for (int j = 0; j < N; j++) {
            state.x[j] = here ? worked_on(structure, row, j, stored) : number(0);
            range.look(state.x[j]);
        }
        range = merged(range, LANES);
        const int shift = range.shift();
        const Scale scale(shift);
        const Magnitude of_matrix(-range.excess()), of_inverse(range.excess());
        R norm = 0, norm_of_inverse = 0;
        for (int i = 0; here && i < N; i++) norm += of_matrix(scale(given(structure, i, row, stored)));
        norm = largest_of(norm, LANES);
#pragma unroll
        for (int j = 0; j < N; j++) state.x[j] = scale(state.x[j]);
        __syncwarp();
        state.eliminate(mine, order);
        if (here)
#pragma unroll
            for (int j = 0; j < N; j++) mine[state.step * ROW + order[j]] = state.x[j];
        __syncwarp();
        const Scale back(shift);
        int overflow = 0;
        for (int i = 0; here && i < N; i++) {
            const T value = found(structure, i, row, stored);
            norm_of_inverse += of_inverse(value);
            overflow |= !is_finite(back(value));
        }
        norm_of_inverse = largest_of(norm_of_inverse, LANES);
        overflow = any_of(overflow, LANES);
        if (row == 0) {
            order[N] = info_of(range.finite, state.pivot, overflow);
            order[N + 1] = shift;
            if (which < count) {
                info[first + which] = order[N];
                rcond[first + which] = rcond_of(range.finite, state.pivot, norm, norm_of_inverse);
            }
        }
        __syncwarp();
        for (int e = lane; e < count * N * N; e += 32) {
            const int one = e / (N * N), i = e % (N * N) / N, j = e % N;
            const T* const its = staged + one * N * ROW;
            const int* const note = notes + one * (N + 2) + N;
            const T value = found(structure, i, j, [&](int r, int c) { return its[r * ROW + c]; });
            out[first * N * N + e] = note[0] ? failed() : Scale(note[1])(value);
        }
        __syncwarp();
    }
}

#endif

// --- blocks: what one matrix per block has in common ----------------------------------------------------------------

constexpr int SIDE = 16;  // blocks have SIDE rows of SIDE threads

// Over all threads of a block. `scratch` has room for one value per warp.
template <class V, class Join> static __device__ V over_block(V value, V* scratch, Join join) {
    for (int far = 16; far; far /= 2) value = join(value, (V)__shfl_xor_sync(ALL, value, far, 32));
    __syncthreads();  // others may still read what stood there
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[0];
    for (int w = 1; w < SIDE * SIDE / 32; w++) value = join(value, scratch[w]);
    return value;
}

struct Measured {
    int finite, shift, excess;
    R norm;
};

template <class Get> static __device__ Measured measure(int n, int structure, Get get, R* scratch) {
    Range range;
    for (Long e = threadIdx.x; e < (Long)n * n; e += SIDE * SIDE) range.look(given(structure, e / n, e % n, get));
    range.largest = over_block(range.largest, scratch, [](R a, R b) { return fmax(a, b); });
    range.smallest = over_block(range.smallest, scratch, [](R a, R b) { return fmin(a, b); });
    range.finite = over_block(range.finite, (int*)scratch, [](int a, int b) { return a & b; });
    Measured measured = {range.finite, range.shift(), range.excess(), 0};
    const Scale scale(measured.shift);
    const Magnitude of_matrix(-measured.excess);
    for (int j = threadIdx.x; j < n; j += SIDE * SIDE) {
        R sum = 0;
        for (int i = 0; i < n; i++) sum += of_matrix(scale(given(structure, i, j, get)));
        measured.norm = larger(measured.norm, sum);
    }
    measured.norm = over_block(measured.norm, scratch, larger);
    return measured;
}

// Turns the inverse of what was worked on into that of the matrix, which may be in its place, and accounts for it.
template <class Get>
static __device__ void finish(int n, int structure, Measured measured, int pivot, Get get, T* out, int* info, R* rcond,
                              R* scratch) {
    const Scale back(measured.shift);
    const Magnitude of_inverse(measured.excess);
    R norm_of_inverse = 0;
    int overflow = 0;
    for (int j = threadIdx.x; j < n; j += SIDE * SIDE) {
        R sum = 0;
        for (int i = 0; i < n; i++) {
            const T value = found(structure, i, j, get);
            sum += of_inverse(value);
            overflow |= !is_finite(back(value));
        }
        norm_of_inverse = larger(norm_of_inverse, sum);
    }
    norm_of_inverse = over_block(norm_of_inverse, scratch, larger);
    overflow = over_block(overflow, (int*)scratch, [](int a, int b) { return a | b; });
    const int code = info_of(measured.finite, pivot, overflow);
    if (threadIdx.x == 0) {
        *info = code;
        *rcond = rcond_of(measured.finite, pivot, measured.norm, norm_of_inverse);
    }
    for (Long e = threadIdx.x; e < (Long)n * n; e += SIDE * SIDE) {
        const int i = e / n, j = e % n;
        if (structure == GENERAL) {
            out[e] = code ? failed() : back(get(i, j));
        } else if (i <= j) {  // two numbers at a time, each of which may depend on both
            const T upper = code ? failed() : back(found(structure, i, j, get));
            const T lower = code ? failed() : back(found(structure, j, i, get));
            out[(Long)j * n + i] = lower;
            out[(Long)i * n + j] = upper;
        }
    }
}

// --- per_block --------------------------------------------------------------------------------------------------

#ifdef LAYOUT_PER_BLOCK

constexpr int TILE = N / SIDE;  // each thread has TILE x TILE numbers, SIDE apart

// What the threads of a block share; two of each, so that one is read while the next is written.
struct Board {
    T column[2][N], line[2][N];
    R best[2][SIDE];
    int at[2][SIDE];
    int order[N], step[N];  // where the k-th pivot stood, and which pivot stood in a row
    R scratch[SIDE];
};

// One step for the tile of a thread. `local` says which of its columns may be the pivot's: known when compiled.
template <int local>
static __device__ bool eliminate(T (&x)[TILE][TILE], int n, Board& board, unsigned& used, int& pivot) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
#pragma unroll 1
    for (int kx = 0; kx < SIDE; kx++) {
        const int k = local * SIDE + kx, now = k & 1;
        if (k >= n) return false;
        T* const column = board.column[now];
        T* const line = board.line[now];
        int p = k;
        if (tx == kx) {
            R best = -1;
            int at = 0;
#pragma unroll
            for (int li = 0; li < TILE; li++) {
                const int i = li * SIDE + ty;
                column[i] = x[li][local];
                if (DEFINITE && i < k) line[i] = minus(conj(x[li][local]));
                const R w = weight(x[li][local]);
                if (i < n && !(used >> li & 1) && w > best) best = w, at = i;
            }
            board.best[now][ty] = best;
            board.at[now][ty] = at;
        }
        if (DEFINITE && ty == k % SIDE)
#pragma unroll
            for (int lj = 0; lj < TILE; lj++)
                if (lj * SIDE + tx > k) line[lj * SIDE + tx] = x[local][lj];
        __syncthreads();
        if (!DEFINITE) {
            R best = board.best[now][0];
            p = board.at[now][0];
            for (int t = 1; t < SIDE; t++) {
                const R w = board.best[now][t];
                const int at = board.at[now][t];
                if (w > best || (w == best && at < p)) best = w, p = at;
            }
        }
        const T chosen = column[p];
        if (unfit(chosen) && !pivot) pivot = k + 1;
        const T inverse = DEFINITE ? number(R(1) / real(chosen)) : reciprocal(chosen);
        if (threadIdx.x == 0) {
            board.order[k] = p;
            board.step[p] = k;
        }
        if (!DEFINITE) {
            if (ty == p % SIDE) {
                used |= 1u << p / SIDE;
#pragma unroll
                for (int li = 0; li < TILE; li++)
                    if (li == p / SIDE)
#pragma unroll
                        for (int lj = 0; lj < TILE; lj++) {
                            const int j = lj * SIDE + tx;
                            line[j] = j == k ? inverse : times(x[li][lj], inverse);
                        }
            }
            __syncthreads();
        }
#pragma unroll
        for (int li = 0; li < TILE; li++) {
            const int i = li * SIDE + ty;
            const bool mine = i == p;
            T factor;
            if (DEFINITE) {
                factor = mine ? minus(inverse) : times(i < k ? column[i] : conj(line[i]), inverse);
            } else {
                factor = mine ? number(-1) : column[i];
            }
#pragma unroll
            for (int lj = 0; lj < TILE; lj++) {
                const bool pivots = lj == local && tx == kx;
                const T other = DEFINITE && pivots ? number(1) : line[lj * SIDE + tx];
                x[li][lj] = less_product(mine || pivots ? number(0) : x[li][lj], factor, other);
            }
        }
    }
    return true;
}

template <int local> struct Steps {
    static __device__ void run(T (&x)[TILE][TILE], int n, Board& board, unsigned& used, int& pivot) {
        Steps<local - 1>::run(x, n, board, used, pivot);
        eliminate<local>(x, n, board, used, pivot);
    }
};
template <> struct Steps<-1> {
    static __device__ void run(T (&)[TILE][TILE], int, Board&, unsigned&, int&) {}
};

extern "C" __global__ void __launch_bounds__(SIDE* SIDE)
    per_block(const T* a, T* out, int* info, R* rcond, Long m, int n, int structure) {
    Board& board = *(Board*)memory;
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (Long q = blockIdx.x; q < m; q += gridDim.x) {
        const T* const source = a + q * n * n;
        T* const result = out + q * n * n;
        const auto stored = [&](int i, int j) { return source[i * n + j]; };
        const auto inverse = [&](int i, int j) { return result[i * n + j]; };
        const Measured measured = measure(n, structure, stored, board.scratch);
        const Scale scale(measured.shift);
        T x[TILE][TILE];
#pragma unroll
        for (int li = 0; li < TILE; li++)
#pragma unroll
            for (int lj = 0; lj < TILE; lj++) {
                const int i = li * SIDE + ty, j = lj * SIDE + tx;
                x[li][lj] = i < n && j < n ? scale(worked_on(structure, i, j, stored)) : number(0);
            }
        unsigned used = 0;
        int pivot = 0;
        Steps<TILE - 1>::run(x, n, board, used, pivot);
        __syncthreads();
#pragma unroll
        for (int li = 0; li < TILE; li++)
#pragma unroll
            for (int lj = 0; lj < TILE; lj++) {
                const int i = li * SIDE + ty, j = lj * SIDE + tx;
                if (i < n && j < n) result[board.step[i] * n + board.order[j]] = x[li][lj];
            }
        __syncthreads();
        finish(n, structure, measured, pivot, inverse, result, info + q, rcond + q, board.scratch);
        __syncthreads();
    }
}

#endif

// --- memory -----------------------------------------------------------------------------------------------------

#ifdef LAYOUT_MEMORY

// Positive definite matrices of any size; `DEFINITE` is 1. `lines` has room for one row per block.
extern "C" __global__ void __launch_bounds__(SIDE* SIDE)
    definite(const T* a, T* out, int* info, R* rcond, T* lines, Long m, int n, int structure) {
    R* const scratch = (R*)memory;
    T* const line = lines + (Long)blockIdx.x * n;
    for (Long q = blockIdx.x; q < m; q += gridDim.x) {
        const T* const source = a + q * n * n;
        T* const x = out + q * n * n;
        const auto stored = [&](int i, int j) { return source[(Long)i * n + j]; };
        const auto inverse = [&](int i, int j) { return x[(Long)i * n + j]; };
        const Measured measured = measure(n, structure, stored, scratch);
        const Scale scale(measured.shift);
        for (Long e = threadIdx.x; e < (Long)n * n; e += SIDE * SIDE)
            x[e] = scale(worked_on(structure, e / n, e % n, stored));
        int pivot = 0;
        for (int k = 0; k < n; k++) {
            __syncthreads();
            for (int j = threadIdx.x; j < n; j += SIDE * SIDE)
                line[j] = j >= k ? x[(Long)k * n + j] : minus(conj(x[(Long)j * n + k]));
            __syncthreads();
            const R chosen = real(line[k]);
            if (!(chosen > 0) && !pivot) pivot = k + 1;
            const R by = R(1) / chosen;
            // Rows by threads' rows, so that neighbours in memory fall to neighbouring threads.
            for (int i = threadIdx.x / SIDE; i < n; i += SIDE) {
                const T factor = i == k ? number(-by) : times(i < k ? minus(conj(line[i])) : conj(line[i]), by);
                for (int j = i + threadIdx.x % SIDE; j < n; j += SIDE) {
                    T& value = x[(Long)i * n + j];
                    value = less_product(i == k || j == k ? number(0) : value, factor, j == k ? number(1) : line[j]);
                }
            }
        }
        __syncthreads();
        finish(n, structure, measured, pivot, inverse, x, info + q, rcond + q, scratch);
        __syncthreads();
    }
}

// Between single and double precision. CuPy's own casts take the smallest numbers for zeros.
extern "C" __global__ void widen(const float* a, double* wide, Long count) {
    for (Long e = (Long)blockIdx.x * blockDim.x + threadIdx.x; e < count; e += (Long)gridDim.x * blockDim.x)
        wide[e] = a[e];
}
extern "C" __global__ void narrow(const double* wide, float* a, Long count) {
    for (Long e = (Long)blockIdx.x * blockDim.x + threadIdx.x; e < count; e += (Long)gridDim.x * blockDim.x)
        a[e] = wide[e];
}

// Before cuBLAS: what is worked on, at unit size, column after column as cuBLAS takes it.
extern "C" __global__ void __launch_bounds__(SIDE* SIDE)
    prepare(const T* a, T* work, int* finite, int* shift, int* excess, R* norm, Long m, int n, int structure) {
    for (Long q = blockIdx.x; q < m; q += gridDim.x) {
        const T* const source = a + q * n * n;
        const auto stored = [&](int i, int j) { return source[(Long)i * n + j]; };
        const Measured measured = measure(n, structure, stored, (R*)memory);
        const Scale scale(measured.shift);
        for (Long e = threadIdx.x; e < (Long)n * n; e += SIDE * SIDE) {
            const int i = e / n, j = e % n;
            work[q * n * n + (Long)j * n + i] =
                measured.finite ? scale(worked_on(structure, i, j, stored)) : number(i == j);
        }
        if (threadIdx.x == 0) {
            finite[q] = measured.finite;
            shift[q] = measured.shift;
            excess[q] = measured.excess;
            norm[q] = measured.norm;
        }
    }
}

// After cuBLAS: `info` has its pivots.
extern "C" __global__ void __launch_bounds__(SIDE* SIDE)
    account(const T* work, T* out, int* info, R* rcond, const int* finite, const int* shift, const int* excess,
            const R* norm, Long m, int n, int structure) {
    for (Long q = blockIdx.x; q < m; q += gridDim.x) {
        const T* const x = work + q * n * n;
        const auto inverse = [&](int i, int j) { return x[(Long)j * n + i]; };
        const int pivot = info[q];
        __syncthreads();
        finish(n, structure, {finite[q], shift[q], excess[q], norm[q]}, pivot, inverse, out + q * n * n, info + q,
               rcond + q, (R*)memory);
        __syncthreads();
    }
}

#endif
