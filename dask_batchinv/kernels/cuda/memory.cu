// Positive definite matrices, one per block, of any size, in global memory.

// The rows of a panel, and the numbers along a side of what is updated at a time.
constexpr int PANEL = SIDE, PATCH = 4 * SIDE;

// The rest of shared memory.
struct Panel {
    T diagonal[PANEL][PANEL + 1];
    T by[PANEL][PANEL];  // for each pivot: its reciprocal, and multiples of its row for the other rows
    T left[PANEL][PATCH], right[PANEL][PATCH];
};
static_assert(SHARED == SCRATCH + (int)sizeof(Panel), "launch.py has another layout");

// Sweeps the upper triangle of the block on the diagonal; returns the number of its first unfit pivot, or 0. What
// columns beside it are eliminated with is left in `by`.
static __device__ int sweep_diagonal(Panel& panel, int size) {
    auto& x = panel.diagonal;
    const int i = threadIdx.x / SIDE, j = threadIdx.x % SIDE;
    panel.by[i][j] = number(i == j);  // of the rows that the last panel lacks
    int pivot = 0;
    for (int k = 0; k < size; k++) {
        __syncthreads();
        const R chosen = real(x[k][k]), inverse = R(1) / chosen;
        if (!(chosen > 0) && !pivot) pivot = k + 1;
        // What stands in a row left of its pivot is the column above it, up to the sign.
        const auto in_column = [&](int r) { return r < k ? x[r][k] : conj(x[k][r]); };
        const auto in_line = [&](int c) { return c > k ? x[k][c] : minus(conj(x[c][k])); };
        if (i == 0 && j < size) panel.by[k][j] = j == k ? number(inverse) : in_column(j);
        const T value = i == k && j == k ? number(inverse)
                        : i == k         ? times(x[k][j], inverse)
                        : j == k         ? minus(times(x[i][k], inverse))
                                         : less_product(x[i][j], times(in_column(i), inverse), in_line(j));
        __syncthreads();
        if (i <= j && j < size) x[i][j] = value;
    }
    __syncthreads();
    return pivot;
}

// Sweeps the upper triangle of x, an n x n matrix, by panels of rows; returns the number of the first unfit pivot, or 0.
// `left` and `right` have room for PANEL rows.
static __device__ int sweep(T* x, int n, Panel& panel, T* left, T* right) {
    int pivot = 0;
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int start = 0; start < n; start += PANEL) {
        const int size = min(PANEL, n - start), end = start + size;
        __syncthreads();
        if (ty <= tx && tx < size) panel.diagonal[ty][tx] = x[(Long)(start + ty) * n + start + tx];
        const int failed = sweep_diagonal(panel, size);
        if (failed && !pivot) pivot = start + failed;
        // The columns of the panel, each by one thread; those of its own block count as zeros.
        for (int j = threadIdx.x; j < n; j += THREADS) {
            const bool before = j < start, beside = before || j >= end;
            T p[PANEL];
#pragma unroll
            for (int r = 0; r < PANEL; r++) {
                p[r] = !beside || r >= size ? number(0)
                       : before             ? minus(conj(x[(Long)j * n + start + r]))
                                            : x[(Long)(start + r) * n + j];
                left[(Long)r * n + j] = before ? minus(conj(p[r])) : conj(p[r]);
            }
#pragma unroll
            for (int k = 0; k < PANEL; k++) {
                p[k] = times(p[k], real(panel.by[k][k]));
#pragma unroll
                for (int r = 0; r < PANEL; r++)
                    if (r != k) p[r] = less_product(p[r], panel.by[k][r], p[k]);
            }
#pragma unroll
            for (int r = 0; r < PANEL; r++) right[(Long)r * n + j] = p[r];
        }
        // All others, less the products of the two.
        for (int top = 0; top < n; top += PATCH)
            for (int first = top; first < n; first += PATCH) {
                __syncthreads();
                for (int e = threadIdx.x; e < PANEL * PATCH; e += THREADS) {
                    const int r = e / PATCH, c = e % PATCH;
                    panel.left[r][c] = top + c < n ? left[(Long)r * n + top + c] : number(0);
                    panel.right[r][c] = first + c < n ? right[(Long)r * n + first + c] : number(0);
                }
                __syncthreads();
                T sums[4][4];
#pragma unroll
                for (int a = 0; a < 4; a++)
#pragma unroll
                    for (int b = 0; b < 4; b++) {
                        const int i = top + ty + a * SIDE, j = first + tx + b * SIDE;
                        sums[a][b] = i <= j && j < n ? x[(Long)i * n + j] : number(0);
                    }
#pragma unroll 4
                for (int r = 0; r < PANEL; r++)
#pragma unroll
                    for (int a = 0; a < 4; a++)
#pragma unroll
                        for (int b = 0; b < 4; b++)
                            sums[a][b] = less_product(sums[a][b], panel.left[r][ty + a * SIDE],
                                                      panel.right[r][tx + b * SIDE]);
#pragma unroll
                for (int a = 0; a < 4; a++)
#pragma unroll
                    for (int b = 0; b < 4; b++) {
                        const int i = top + ty + a * SIDE, j = first + tx + b * SIDE;
                        if (i <= j && j < n) x[(Long)i * n + j] = sums[a][b];
                    }
            }
        __syncthreads();
        for (int j = threadIdx.x; j < n; j += THREADS)
            for (int r = 0; r < size; r++) {
                if (j < start) x[(Long)j * n + start + r] = conj(right[(Long)r * n + j]);
                if (j >= end) x[(Long)(start + r) * n + j] = right[(Long)r * n + j];
            }
        if (ty <= tx && tx < size) x[(Long)(start + ty) * n + start + tx] = panel.diagonal[ty][tx];
    }
    __syncthreads();
    return pivot;
}

// Positive definite matrices of any size. `lines` has room for two panels per block.
extern "C" __global__ void __launch_bounds__(THREADS)
    definite(const T* a, T* out, int* info, R* rconds, Word* overflows, T* lines, Long m, int n) {
    Panel& panel = *(Panel*)(memory + SCRATCH);
    T* const left = lines + (Long)blockIdx.x * (2 * PANEL) * n;
    for (Long q = blockIdx.x; q < m; q += gridDim.x) {
        const T* const source = a + q * n * n;
        T* const x = out + q * n * n;
        const auto stored = [&](int i, int j) { return source[(Long)i * n + j]; };
        const Measured measured = measure(n, stored);
        const R scale = F::power(measured.shift);
        for_each(n, [&](int i, int j) {
            if (i <= j) x[(Long)i * n + j] = times(given(i, j, stored), scale);
        });
        const int pivot = sweep(x, n, panel, left, left + (Long)PANEL * n);
        finish(q, n, measured, pivot, x, info, rconds, overflows);
        __syncthreads();
    }
}
