// One matrix in the registers of LANES lanes of a warp, every LANES-th row in the same lane, several matrices per warp.
//
//     LANES  lanes of a matrix: a power of two
//     WARPS  warps of a block

constexpr int ROWS = (N + LANES - 1) / LANES;  // of a lane
constexpr int TOGETHER = 32 / LANES;           // matrices of a warp

// Rows are staged by pieces of V numbers, CHUNKS of them. In shared memory rows and matrices are so far apart that
// neighbours in a column are in different banks; or else, where a row is a power of two, its pieces change places.
constexpr int ROW_NBYTES = N * (int)sizeof(T);
constexpr int DIVISOR = ROW_NBYTES % 16 == 0 ? 16 : ROW_NBYTES % 8 == 0 ? 8 : 4;
constexpr int BYTES = DIVISOR > (int)sizeof(T) ? DIVISOR : (int)sizeof(T);
constexpr int V = BYTES / (int)sizeof(T), CHUNKS = N / V;
constexpr bool TURNED = BYTES == 16 && CHUNKS > 1 && (CHUNKS & (CHUNKS - 1)) == 0;
constexpr int PITCH = (V == 1 || TURNED ? CHUNKS : CHUNKS | 1) * BYTES;
constexpr int SIZE = N * PITCH + (V > 1 && !TURNED && LANES < 8 && N * PITCH / 16 % 8 == 0 ? 64 : 0);
constexpr bool GAPLESS = !TURNED && SIZE == N * ROW_NBYTES;
// Rows of pivots are passed on by vectors of 16 bytes, whatever n.
constexpr int WIDTH = 16 / (int)sizeof(T), VECTORS = (N + WIDTH - 1) / WIDTH;
constexpr int OF_WARP = (TOGETHER * (SIZE + 2 * 16 * VECTORS + 4 * N) + 15) / 16 * 16;
static_assert(SHARED == WARPS * OF_WARP, "launch.py has another layout");

template <int K> struct alignas(K * sizeof(T)) Many {
    T v[K];
};

// What the places of pieces of a row are combined with.
static __device__ int turn(int which, int row) {
    if (!TURNED) return 0;
    constexpr int PER = CHUNKS >= 8 ? 1 : 8 / CHUNKS, MANY = CHUNKS >= 8 ? 8 : CHUNKS;
    constexpr int OF_MATRIX = LANES >= 8 ? 0 : LANES / PER > 0 ? LANES / PER : 1;
    return (row / PER + which * OF_MATRIX & MANY - 1) * BYTES;
}
// Where a byte of a row stands, counted from the first matrix of a warp.
static __device__ int place(int which, int row, int byte) { return which * SIZE + row * PITCH + (byte ^ turn(which, row)); }

// Copies the matrices of a warp: `move(in global memory, in shared memory)` for pieces of one type.
template <class Move> static __device__ void move_matrices(int count, bool aligned, unsigned char* global,
                                                           unsigned char* shared, Move move) {
    const int lane = threadIdx.x % 32;
    if (count == TOGETHER && aligned) {
        // Where matrices stand without gaps, by 16 bytes, be a row a multiple of them or not.
        constexpr int K = GAPLESS ? 16 : BYTES, COUNT = TOGETHER * N * ROW_NBYTES / K;
#pragma unroll
        for (int t = 0; t < (COUNT + 31) / 32; t++) {
            const int e = t * 32 + lane;
            if (COUNT % 32 == 0 || e < COUNT)
                move((Piece<K>*)(global + e * K),
                     (Piece<K>*)(shared + (GAPLESS ? e * K
                                                   : place(e / (N * CHUNKS), e % (N * CHUNKS) / CHUNKS, e % CHUNKS * K))));
        }
        return;
    }
    constexpr int EACH = N * PARTS;
    for (int e = lane; e < count * N * EACH; e += 32)
        move((R*)global + e, (R*)(shared + place(e / EACH / N, e / EACH % N, e % EACH * (int)sizeof(R))));
}

// Over the lanes of a matrix.
static __device__ Word most_of(Word a) {
#pragma unroll
    for (int far = LANES / 2; far; far /= 2) a = max(a, __shfl_xor_sync(ALL, a, far, 32));
    return a;
}
static __device__ R largest_of(R a) {
#pragma unroll
    for (int far = LANES / 2; far; far /= 2) a = larger(a, __shfl_xor_sync(ALL, a, far, 32));
    return a;
}
static __device__ bool any_of(int a) {
#pragma unroll
    for (int far = LANES / 2; far; far /= 2) a |= __shfl_xor_sync(ALL, a, far, 32);
    return a;
}

struct Lane {
    T x[ROWS][N];
    T inverses[ROWS];  // of the pivots, by which rows are multiplied in the end
    int steps[ROWS];   // in which rows had their pivots
    int l, pivot = 0;
    bool lost = false;  // as in per_thread.cu

    __device__ int row(int r) const { return r * LANES + l; }
    __device__ bool here(int r) const { return N % LANES == 0 || row(r) < N; }

    // The 1-norm times a power of two: of columns, or of rows where those of the matrix are its.
    __device__ R norm(R by, bool of_rows) const {
        R sums[N], largest = 0;
        if (of_rows) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                R sum = 0;
#pragma unroll
                for (int j = 0; j < N; j++) sum = plus_magnitude(x[r][j], by, sum);
                largest = larger(largest, sum);
            }
            return largest_of(largest);
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            sums[j] = 0;
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[j] = plus_magnitude(x[r][j], by, sums[j]);
        }
        // Each lane gives half of its columns away for the other half of another's.
        constexpr int PADDED = (N + LANES - 1) / LANES * LANES;
        R s[PADDED];
#pragma unroll
        for (int j = 0; j < PADDED; j++) s[j] = j < N ? sums[j < N ? j : 0] : R(0);
        int columns = PADDED;
#pragma unroll
        for (int far = LANES / 2; far; far /= 2) {
            columns /= 2;
            const bool upper = l & far;
#pragma unroll
            for (int j = 0; j < PADDED / 2; j++)
                if (j < columns) {
                    const R mine = upper ? s[j + columns] : s[j], its = upper ? s[j] : s[j + columns];
                    s[j] = mine + __shfl_xor_sync(ALL, its, far, 32);
                }
        }
#pragma unroll
        for (int j = 0; j < PADDED / LANES; j++) largest = larger(largest, s[j]);
        return largest_of(largest);
    }

    // Passes a row on to the other lanes of its matrix.
    __device__ void pass_on(Many<WIDTH>* line, const bool (&its)[ROWS]) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (its[r]) {
#pragma unroll
                for (int c = 0; c < VECTORS; c++) {
                    Many<WIDTH> put = {};
#pragma unroll
                    for (int v = 0; v < WIDTH; v++)
                        if (c * WIDTH + v < N) put.v[v] = x[r][c * WIDTH + v];
                    line[c * TOGETHER] = put;
                }
            }
        __syncwarp();
    }

    // `lines` has room for two rows, one of which is read while the next is written, vector by vector for all matrices
    // of the warp. In step k, x[.][j] is of column (k + j) mod N.
    __device__ void eliminate(Many<WIDTH>* lines, int which, int* order) {
        Word ids[ROWS];  // 0 where a row has had its pivot
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            ids[r] = row(r) < N ? 63 - row(r) : 0;
            steps[r] = row(r);
            inverses[r] = number(0);
        }
#pragma unroll 1
        for (int k = 0; k < N; k++) {
            Many<WIDTH>* const line = lines + (k & 1) * (VECTORS * TOGETHER) + which;
            bool its[ROWS];
            if (PIVOTING) {
                // The first of the largest: rows are told apart by the last bits of keys.
                Word keys[ROWS], best = 0;
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    keys[r] = ids[r] ? (size_word(x[r][0]) & ~63u) | ids[r] : 0;
                    best = max(best, keys[r]);
                }
                best = most_of(best);
#pragma unroll
                for (int r = 0; r < ROWS; r++) its[r] = keys[r] == best;
                if (l == 0) order[k] = 63 - (int)(best & 63);
            } else {
#pragma unroll
                for (int r = 0; r < ROWS; r++) its[r] = row(r) == k;
            }
            pass_on(line, its);
            Many<WIDTH> got = line[0];
            const T chosen = got.v[0];
            if (is_zero(chosen) && !pivot) {
                pivot = k + 1;
                if (PIVOTING)
#pragma unroll
                    for (int r = 0; r < ROWS; r++) lost |= ids[r] && !is_zero(x[r][0]);
            }
            const T inverse = reciprocal(chosen);
            T factors[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                // Below the pivots of a triangular matrix are zeros, be a pivot what it may.
                const bool none = its[r] || (!PIVOTING && row(r) > k);
                factors[r] = none ? number(0) : times(x[r][0], inverse);
                if (its[r]) steps[r] = k, ids[r] = 0, inverses[r] = inverse;
            }
#pragma unroll
            for (int c = 0; c < VECTORS; c++) {
                if (c) got = line[c * TOGETHER];
#pragma unroll
                for (int v = 0; v < WIDTH; v++) {
                    const int j = c * WIDTH + v;
                    if (j == 0 || j >= N) continue;
#pragma unroll
                    for (int r = 0; r < ROWS; r++) x[r][j - 1] = less_product(x[r][j], factors[r], got.v[v]);
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) x[r][N - 1] = its[r] ? number(1) : minus(factors[r]);
        }
        __syncwarp();
        multiply_rows();
    }

    __device__ void multiply_rows() {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < N; j++) x[r][j] = here(r) ? times(x[r][j], inverses[r]) : number(0);
    }

    // Positive definite matrices, by the three parts that numbers.cuh names. Columns are turned as in `eliminate`; in
    // the second part, the other way round. What a row does not contribute is passed on as zeros.
    __device__ void invert_definite(Many<WIDTH>* lines, int which) {
        int turns = 0;
        Pivots pivots;
        T factors[ROWS], last[ROWS];
        // Passes on what `choose(r, j)` makes of row k, which is then `keep` times that if `keep` is not 0.
        const auto share = [&](int k, auto choose, auto keep) {
            Many<WIDTH>* const line = lines + (turns++ & 1) * (VECTORS * TOGETHER) + which;
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                if (row(r) == k) {
                    const R by = keep(r);
#pragma unroll
                    for (int c = 0; c < VECTORS; c++) {
                        Many<WIDTH> put = {};
#pragma unroll
                        for (int v = 0; v < WIDTH; v++) {
                            const int j = c * WIDTH + v;
                            if (j >= N) continue;
                            put.v[v] = choose(r, j);
                            if (by != 0) x[r][j] = times(put.v[v], by);
                        }
                        line[c * TOGETHER] = put;
                    }
                }
            __syncwarp();
            return line;
        };
        const auto keep_all = [](int) { return R(0); };
        // A number of a line that is not known when this is compiled.
        const auto at = [](const Many<WIDTH>* line, int j) { return line[j / WIDTH * TOGETHER].v[j % WIDTH]; };
        // Subtracts products from all columns but the first, turns them by one to the left, and puts `last` behind.
        const auto subtract = [&](const Many<WIDTH>* line) {
#pragma unroll
            for (int c = 0; c < VECTORS; c++) {
                const Many<WIDTH> got = line[c * TOGETHER];
#pragma unroll
                for (int v = 0; v < WIDTH; v++) {
                    const int j = c * WIDTH + v;
                    if (j == 0 || j >= N) continue;
#pragma unroll
                    for (int r = 0; r < ROWS; r++) x[r][j - 1] = less_product(x[r][j], factors[r], got.v[v]);
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) x[r][N - 1] = last[r];
        };
#pragma unroll 1
        for (int k = 0; k < N; k++) {
            const Many<WIDTH>* const line =
                share(k, [&](int r, int j) { return j < N - k ? x[r][j] : number(0); }, keep_all);
            const R chosen = real(at(line, 0)), inverse = reciprocal(chosen);
            pivots.look(k, chosen, inverse);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const bool below = row(r) > k && here(r);
                factors[r] = below ? times(conj(at(line, row(r) - k)), inverse) : number(0);
                last[r] = below ? factors[r] : x[r][0];  // of L, which is left of the pivot
                if (row(r) == k) inverses[r] = number(inverse);
            }
            subtract(line);
        }
#pragma unroll 1
        for (int k = N - 1; k >= 0; k--) {
            // x[.][j] is of column (j + k + 1) mod N: the last of column k, those before it of the columns before.
            const Many<WIDTH>* const line = share(
                k, [&](int r, int j) { return j >= N - 1 - k && j < N - 1 ? x[r][j] : number(0); }, keep_all);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                last[r] = x[r][N - 1];
                factors[r] = row(r) > k ? last[r] : row(r) == k ? number(2) : number(0);  // 2: x - 2 x is -x
            }
#pragma unroll
            for (int c = VECTORS - 1; c >= 0; c--) {
                const Many<WIDTH> got = line[c * TOGETHER];
#pragma unroll
                for (int v = WIDTH - 1; v >= 0; v--) {
                    const int j = c * WIDTH + v;
                    if (j >= N - 1) continue;
#pragma unroll
                    for (int r = 0; r < ROWS; r++) x[r][j + 1] = less_product(x[r][j], factors[r], got.v[v]);
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) x[r][0] = last[r];
        }
#pragma unroll 1
        for (int k = 0; k < N; k++) {
            const Many<WIDTH>* const line = share(
                k, [&](int r, int j) { return j == 0 ? number(1) : j < N - k ? number(0) : x[r][j]; },
                [&](int r) { return real(inverses[r]); });
            const R inverse = __shfl_sync(ALL, pick(k / LANES), threadIdx.x % 32 / LANES * LANES + k % LANES, 32);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                factors[r] = row(r) < k ? times(conj(at(line, row(r) - k + N)), -inverse) : number(0);
                last[r] = row(r) < k ? minus(factors[r]) : x[r][0];
            }
            subtract(line);
        }
        __syncwarp();
        pivot = pivots.unfit;
        lost = pivots.lost;
#pragma unroll
        for (int r = 0; r < ROWS; r++) steps[r] = row(r);
    }

    // The reciprocal of the pivot of row r, which is not known when this is compiled.
    __device__ R pick(int r) const {
        R found = 0;
#pragma unroll
        for (int s = 0; s < ROWS; s++) found = s == r ? real(inverses[s]) : found;
        return found;
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    per_warp(const T* a, T* out, int* info, R* rconds, Word* overflows, Long m, int) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, which = lane / LANES;
    unsigned char* const staged = memory + warp * OF_WARP;
    Many<WIDTH>* const lines = (Many<WIDTH>*)(staged + TOGETHER * SIZE);
    int* const order = (int*)(staged + TOGETHER * (SIZE + 2 * 16 * VECTORS)) + which * N;
    const bool aligned = ((size_t)a | (size_t)out) % 16 == 0;
    const auto at = [&](int i, int j) -> T& { return *(T*)(staged + place(which, i, j * (int)sizeof(T))); };
    const auto stored = [&](int i, int j) { return at(i, j); };

    const Long step = (Long)gridDim.x * (WARPS * TOGETHER);
    for (Long first = ((Long)blockIdx.x * WARPS + warp) * TOGETHER; first < m; first += step) {
        const int count = (int)min((Long)TOGETHER, m - first);
        move_matrices(count, aligned, (unsigned char*)(a + first * (N * N)), staged,
                      [](auto* global, auto* shared) { *shared = *global; });
        __syncwarp();

        Lane state;
        state.l = lane % LANES;
        auto& x = state.x;
        // By pieces, from which `read` makes what is wanted in row r, column j.
        const auto load = [&](auto read) {
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
                    const int i = state.row(r);
                    Many<V> got = {};
                    if (STRUCTURE == GENERAL && state.here(r)) got = *(Many<V>*)(staged + place(which, i, c * BYTES));
#pragma unroll
                    for (int v = 0; v < V; v++)
                        x[r][c * V + v] = STRUCTURE == GENERAL || !state.here(r) ? got.v[v] : read(i, c * V + v, stored);
                }
        };
        load([](int i, int j, auto get) { return worked_on(i, j, get); });
        Range range;
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < N; j++) range.look(x[r][j]);
        range.most = most_of(range.most);
        range.least = ~most_of(~range.least);
        const int shift = range.shift(), excess = range.excess();
        const R scale = F::power(shift);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < N; j++) x[r][j] = times(x[r][j], scale);
        // Puts every number times a factor where it belongs, after pivots were chosen or not.
        const auto put_back = [&](R factor, bool chosen) {
            int columns[N];
#pragma unroll
            for (int j = 0; j < N; j++) columns[j] = (chosen ? order[j] : j) * (int)sizeof(T);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                if (state.here(r))
#pragma unroll
                    for (int j = 0; j < N; j++)
                        *(T*)(staged + place(which, state.steps[r], columns[j])) = scaled(x[r][j], factor);
        };
        constexpr bool OF_ROWS = MIRRORED || STRUCTURE == LOWER;
        const R norm = state.norm(F::power(-excess - SLACK), OF_ROWS);
        __syncwarp();

        if (DEFINITE || TRIED) state.invert_definite(lines, which);
        else state.eliminate(lines, which, order);
        if (TRIED) {
            const bool again = state.pivot != 0 || state.lost;
            if (!again) put_back(1, false);
            __syncwarp();
            if (__any_sync(ALL, again)) {
                // Of matrices that were definite, what is found now is not looked at.
                load([](int i, int j, auto get) { return given(i, j, get); });
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int j = 0; j < N; j++) x[r][j] = times(x[r][j], scale);
                state.pivot = 0;
                state.lost = false;
                __syncwarp();
                state.eliminate(lines, which, order);
                if (again) put_back(1, true);
                else state.pivot = 0, state.lost = false;
                __syncwarp();
            }
        } else if (MIRRORED) {
            put_back(1, PIVOTING);
            __syncwarp();
        }
        if (MIRRORED) {
            load([](int i, int j, auto get) { return found(i, j, get); });
            __syncwarp();
        }
        Norm of_inverse(excess);
#pragma unroll 1
        for (int pass = 0;; pass++) {
            const bool again = of_inverse.again(state.norm(of_inverse.factor(), OF_ROWS), pass);
            if (PARTS == 1 || !__any_sync(ALL, again)) break;
        }
        bool overflow = false;
        if (__any_sync(ALL, of_inverse.may_overflow(excess, shift) || state.lost)) {
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int j = 0; j < N; j++) overflow |= !is_finite(scaled(x[r][j], scale));
            overflow = any_of(overflow);
            if (any_of(state.lost)) state.pivot = 0, overflow = true;
        }
        const int code = info_of(range.finite(), state.pivot, overflow);
        if (state.l == 0 && which < count)
            report(first + which, code, rcond_of(range.finite(), state.pivot, norm, of_inverse), info, rconds, overflows);
        const R by = code ? F::not_a_number() : scale;
        if (STRUCTURE == GENERAL) put_back(by, true);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (STRUCTURE == GENERAL || !state.here(r)) continue;
            if (STRUCTURE == LOWER) {
#pragma unroll
                for (int j = 0; j < N; j++) at(j, state.row(r)) = scaled(x[r][j], by);
                continue;
            }
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                Many<V> put;
#pragma unroll
                for (int v = 0; v < V; v++) put.v[v] = scaled(x[r][c * V + v], by);
                *(Many<V>*)(staged + place(which, state.row(r), c * BYTES)) = put;
            }
        }
        __syncwarp();
        move_matrices(count, aligned, (unsigned char*)(out + first * (N * N)), staged,
                      [](auto* global, auto* shared) { *global = *shared; });
        __syncwarp();
    }
}
