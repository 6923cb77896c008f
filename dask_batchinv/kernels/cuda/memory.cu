// Positive definite matrices, one per block, of any size, in global memory.

// The rows of a panel, and the numbers along a side of what is updated at a time.
constexpr int PANEL = SIDE, PATCH = 4 * SIDE;

// The rest of shared memory.
struct Panel {
    T upper[PANEL][PANEL + 1];  // the block on the diagonal
    T lower[PANEL][PANEL + 1];  // of L there, later of Y
    R inverses[PANEL];          // of the pivots
    T left[PANEL][PATCH], right[PANEL][PATCH];
};
static_assert(SHARED == SCRATCH + (int)sizeof(Panel), "launch.py has another layout");

// A matrix and what goes with it: for each panel, PANEL factors of every row, and of every column.
struct Matrix {
    T* const x;
    const int n;
    T *const left, *const right;
    R* const inverses;
    Panel& panel;
    Pivots pivots;

    __device__ T& at(int i, int j) const { return x[(Long)i * n + j]; }
    __device__ T& of_row(int k, int i) const { return left[(Long)k * n + i]; }
    __device__ T& of_column(int k, int j) const { return right[(Long)k * n + j]; }

    // Subtracts the products of the panel's factors from rows and columns of certain ranges, where they are `wanted`.
    template <class Wanted>
    __device__ void subtract(int top, int bottom, int first, int last, Wanted wanted) const {
        const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
        for (int p = top; p < bottom; p += PATCH)
            for (int q = first; q < last; q += PATCH) {
                const auto row = [&](int a) { return p + ty + a * SIDE; };
                const auto column = [&](int b) { return q + tx + b * SIDE; };
                const auto here = [&](int a, int b) {
                    return row(a) < bottom && column(b) < last && wanted(row(a), column(b));
                };
                if (!wanted(p, min(q + PATCH, last) - 1) && !wanted(min(p + PATCH, bottom) - 1, q)) continue;
                __syncthreads();
                for (int e = threadIdx.x; e < PANEL * PATCH; e += THREADS) {
                    const int k = e / PATCH, c = e % PATCH;
                    panel.left[k][c] = p + c < bottom ? of_row(k, p + c) : number(0);
                    panel.right[k][c] = q + c < last ? of_column(k, q + c) : number(0);
                }
                __syncthreads();
                T sums[4][4];
#pragma unroll
                for (int a = 0; a < 4; a++)
#pragma unroll
                    for (int b = 0; b < 4; b++) sums[a][b] = here(a, b) ? at(row(a), column(b)) : number(0);
#pragma unroll 4
                for (int k = 0; k < PANEL; k++)
#pragma unroll
                    for (int a = 0; a < 4; a++)
#pragma unroll
                        for (int b = 0; b < 4; b++)
                            sums[a][b] = less_product(sums[a][b], panel.left[k][ty + a * SIDE],
                                                      panel.right[k][tx + b * SIDE]);
#pragma unroll
                for (int a = 0; a < 4; a++)
#pragma unroll
                    for (int b = 0; b < 4; b++)
                        if (here(a, b)) at(row(a), column(b)) = sums[a][b];
            }
        __syncthreads();
    }

    // L and D of the block on the diagonal.
    __device__ void factor_block(int start, int size) {
        const int i = threadIdx.x / SIDE, j = threadIdx.x % SIDE;
        auto& u = panel.upper;
        u[i][j] = i <= j && j < size ? at(start + i, start + j) : number(0);
        panel.lower[i][j] = number(0);
        if (j == 0) panel.inverses[i] = 0;
        for (int k = 0; k < size; k++) {
            __syncthreads();
            const R chosen = real(u[k][k]), inverse = reciprocal(chosen);
            pivots.look(start + k, chosen, inverse);
            const T factor = times(conj(u[k][i]), inverse), other = u[k][j];
            __syncthreads();
            if (i > k && j >= i) u[i][j] = less_product(u[i][j], factor, other);
            if (i > k && j == k) panel.lower[i][k] = factor;
            if (i == k && j == k) panel.inverses[k] = inverses[start + k] = inverse;
        }
        __syncthreads();
        if (j < i && i < size) at(start + i, start + j) = panel.lower[i][j];
    }

    // (1) L below the diagonal, what is left of A above.
    __device__ void factor() {
        for (int start = 0; start < n; start += PANEL) {
            const int size = min(PANEL, n - start), end = start + size;
            factor_block(start, size);
            for (int j = end + threadIdx.x; j < n; j += THREADS) {
                T u[PANEL];
#pragma unroll
                for (int k = 0; k < PANEL; k++) {
                    u[k] = k < size ? at(start + k, j) : number(0);
#pragma unroll
                    for (int s = 0; s < k; s++) u[k] = less_product(u[k], panel.lower[k][s], u[s]);
                    const T factor = times(conj(u[k]), panel.inverses[k]);
                    of_column(k, j) = u[k];
                    of_row(k, j) = factor;
                    if (k < size) at(j, start + k) = factor;
                }
            }
            subtract(end, n, end, n, [](int i, int j) { return i <= j; });
        }
    }

    // (2) Y in the place of L. Factors are taken from the last to the first.
    __device__ void invert_factor() {
        for (int start = (n - 1) / PANEL * PANEL; start >= 0; start -= PANEL) {
            const int size = min(PANEL, n - start), end = start + size;
            const int i = threadIdx.x / SIDE, j = threadIdx.x % SIDE;
            auto &l = panel.upper, &y = panel.lower;
            l[i][j] = j < i && i < size ? at(start + i, start + j) : number(0);
            __syncthreads();
            if (threadIdx.x < PANEL) {
                const int r = threadIdx.x;
                for (int k = 0; k < PANEL; k++) y[r][k] = k < r ? minus(l[r][k]) : number(0);
                for (int k = r - 1; k > 0; k--)
                    for (int c = 0; c < k; c++) y[r][c] = less_product(y[r][c], y[r][k], l[k][c]);
            }
            __syncthreads();
            for (int r = start + threadIdx.x; r < n; r += THREADS) {
                T ys[PANEL];
#pragma unroll
                for (int k = PANEL - 1; k >= 0; k--) {
                    if (r < end) {  // 2: x - 2 x is -x
                        ys[k] = k == r - start ? number(2) : y[r - start][k];
                    } else {
                        ys[k] = k < size ? at(r, start + k) : number(0);
#pragma unroll
                        for (int s = PANEL - 1; s > k; s--) ys[k] = less_product(ys[k], ys[s], l[s][k]);
                    }
                    of_row(PANEL - 1 - k, r) = ys[k];
                    if (k < size && start + k < r) at(r, start + k) = ys[k];
                }
            }
            for (int c = threadIdx.x; c < start; c += THREADS)
                for (int k = 0; k < PANEL; k++)
                    of_column(PANEL - 1 - k, c) = k < size ? at(start + k, c) : number(0);
            subtract(start, n, 0, start, [](int, int) { return true; });
        }
    }

    // (3) X in the place of Y.
    __device__ void multiply() {
        for (int start = 0; start < n; start += PANEL) {
            const int size = min(PANEL, n - start), end = start + size;
            for (int j = threadIdx.x; j < end; j += THREADS)
                for (int k = 0; k < PANEL; k++) {
                    const bool left_of = k < size && j < start + k;
                    const T y = left_of ? at(start + k, j) : number(k < size && j == start + k);
                    of_column(k, j) = y;
                    of_row(k, j) = k < size ? times(conj(y), -inverses[start + k]) : number(0);
                    if (k < size && j <= start + k) at(start + k, j) = number(0);
                }
            subtract(0, end, 0, end, [](int i, int j) { return j <= i; });
        }
    }
};

// Positive definite matrices of any size. `lines` has room for two panels and a row for each block.
extern "C" __global__ void __launch_bounds__(THREADS)
    definite(const T* a, T* out, int* info, R* rconds, Word* overflows, T* lines, Long m, int n) {
    T* const mine = lines + (Long)blockIdx.x * (2 * PANEL + 1) * n;
    for (Long q = blockIdx.x; q < m; q += gridDim.x) {
        const T* const source = a + q * n * n;
        const auto stored = [&](int i, int j) { return source[(Long)i * n + j]; };
        const Measured measured = measure(n, stored);
        const R scale = F::power(measured.shift);
        Matrix matrix = {out + q * n * n, n, mine, mine + (Long)PANEL * n, (R*)(mine + (Long)2 * PANEL * n),
                         *(Panel*)(memory + SCRATCH)};
        for_each(n, [&](int i, int j) {
            if (i <= j) matrix.at(i, j) = times(given(i, j, stored), scale);
        });
        __syncthreads();
        matrix.factor();
        matrix.invert_factor();
        matrix.multiply();
        for_each(n, [&](int i, int j) {
            if (i > j) matrix.at(j, i) = conj(matrix.at(i, j));
        });
        __syncthreads();
        finish(q, n, measured, matrix.pivots.unfit, matrix.x, info, rconds, overflows);
        __syncthreads();
    }
}
