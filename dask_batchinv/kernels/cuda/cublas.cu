// The ends of what cuBLAS does between: one matrix per block.

constexpr int EDGE = 32;  // of what is transposed at a time
static_assert(SHARED == SCRATCH + (int)sizeof(T) * EDGE * (EDGE + 1), "launch.py has another layout");

// Calls `put(i, j, get(j, i))` for every number of a matrix, so that neighbours fall to neighbours in both.
template <class Get, class Put> static __device__ void transpose(int n, Get get, Put put) {
    T(*const tile)[EDGE + 1] = (T(*)[EDGE + 1])(memory + SCRATCH);
    const int tx = threadIdx.x % EDGE, ty = threadIdx.x / EDGE;
    for (int top = 0; top < n; top += EDGE)
        for (int left = 0; left < n; left += EDGE) {
            __syncthreads();
            for (int r = ty; r < EDGE; r += THREADS / EDGE)
                if (left + r < n && top + tx < n) tile[r][tx] = get(left + r, top + tx);
            __syncthreads();
            for (int r = ty; r < EDGE; r += THREADS / EDGE)
                if (top + r < n && left + tx < n) put(top + r, left + tx, tile[tx][r]);
        }
}

// Before cuBLAS: what is worked on, at unit size, column after column as cuBLAS takes it.
extern "C" __global__ void __launch_bounds__(THREADS)
    prepare(const T* a, T* work, int* finite, int* shift, int* excess, R* norm, Long m, int n) {
    for (Long q = blockIdx.x; q < m; q += gridDim.x) {
        const T* const source = a + q * n * n;
        const auto stored = [&](int i, int j) { return source[(Long)i * n + j]; };
        const Measured measured = measure(n, stored);
        const R scale = F::power(measured.shift);
        transpose(
            n, [&](int i, int j) { return measured.finite ? times(worked_on(i, j, stored), scale) : number(i == j); },
            [&](int i, int j, T value) { work[q * n * n + (Long)i * n + j] = value; });
        if (threadIdx.x == 0) {
            finite[q] = measured.finite;
            shift[q] = measured.shift;
            excess[q] = measured.excess;
            norm[q] = measured.norm;
        }
    }
}

// After cuBLAS: `info` has its pivots. Where matrices were taken for positive definite ones first, `tried` has what became
// of them, and `out` their inverses.
extern "C" __global__ void __launch_bounds__(THREADS)
    account(const T* work, T* out, int* info, R* rconds, Word* overflows, const int* finite, const int* shift,
            const int* excess, const R* norm, const int* tried, const R* tried_rconds, Long m, int n) {
    for (Long q = blockIdx.x; q < m; q += gridDim.x) {
        if (tried && tried[q] == 0) {
            if (threadIdx.x == 0) info[q] = 0, rconds[q] = tried_rconds[q];
            continue;
        }
        T* const x = out + q * n * n;
        const int pivot = info[q];
        transpose(
            n, [&](int i, int j) { return work[q * n * n + (Long)i * n + j]; },
            [&](int i, int j, T value) { x[(Long)i * n + j] = value; });
        __syncthreads();
        finish(q, n, {finite[q], shift[q], excess[q], norm[q]}, pivot, x, info, rconds, overflows);
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
