// One matrix per block: each thread has a tile of ROWS x COLUMNS neighbouring numbers in its registers.
//
//     N        the size of what is computed: a multiple of ROWS and COLUMNS; matrices are filled up with zeros
//     EXACT    whether that is the size of the matrices
//     BLOCKS   so few registers are used that so many blocks find room on a multiprocessor

constexpr int ACROSS = N / COLUMNS, DOWN = N / ROWS;  // threads that share a row, a column
constexpr int THREADS = (ACROSS * DOWN + 31) / 32 * 32;
constexpr int SCANNED = (N + 31) / 32;  // numbers of a column for each lane of a warp
static_assert(N % ROWS == 0 && N % COLUMNS == 0 && N <= 128, "");

// Neighbours that are moved together.
template <int K> struct alignas(K * sizeof(T) % 16 == 0 ? 16 : K * sizeof(T) % 8 == 0 ? 8 : 4) Many {
    T v[K];
};

// What the threads of a block share; two of each, so that one is read while the next is written.
struct Board {
    T column[2][N], line[2][N];
    union {
        R partial[ACROSS > DOWN ? ACROSS : DOWN][N];
        T rows[DOWN][N];
    };
    union {
        struct {
            int order[N], step[N];  // where the k-th pivot stood, and which pivot stood in a row
        };
        R inverses[N];  // of the pivots of positive definite matrices
    };
    R reals[32];
    Word words[2][32];
};
static_assert(SHARED == (sizeof(Board) + 15) / 16 * 16, "launch.py has another layout");

static __device__ void barrier() {
    if (THREADS == 32) __syncwarp();
    else __syncthreads();
}

static __device__ Word most_of_warp(Word a) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(ALL, a);
#else
#pragma unroll
    for (int far = 16; far; far /= 2) a = max(a, __shfl_xor_sync(ALL, a, far, 32));
    return a;
#endif
}

// Over all threads of a block.
static __device__ R largest_of(R a, Board& board) {
#pragma unroll
    for (int far = 16; far; far /= 2) a = larger(a, __shfl_xor_sync(ALL, a, far, 32));
    if (THREADS == 32) return a;
    barrier();
    if (threadIdx.x % 32 == 0) board.reals[threadIdx.x / 32] = a;
    barrier();
    a = board.reals[0];
#pragma unroll
    for (int w = 1; w < THREADS / 32; w++) a = larger(a, board.reals[w]);
    return a;
}
static __device__ Range joined(Range range, Board& board) {
    range.most = most_of_warp(range.most);
    range.least = ~most_of_warp(~range.least);
    if (THREADS == 32) return range;
    barrier();
    if (threadIdx.x % 32 == 0)
        board.words[0][threadIdx.x / 32] = range.most, board.words[1][threadIdx.x / 32] = range.least;
    barrier();
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) {
        range.most = max(range.most, board.words[0][w]);
        range.least = min(range.least, board.words[1][w]);
    }
    return range;
}

static __device__ constexpr int least_common_multiple(int a, int b) {
    int multiple = a;
    while (multiple % b) multiple += a;
    return multiple;
}

struct Tile {
    T x[ROWS][COLUMNS];
    T inverses[ROWS];  // of the pivots, by which rows are multiplied in the end
    int n, tx, ty, pivot = 0;
    bool lost = false;  // as in per_thread.cu

    __device__ Tile(int n) : n(n), tx(threadIdx.x % ACROSS), ty(threadIdx.x / ACROSS) {}
    __device__ bool here() const { return THREADS == ACROSS * DOWN || ty < DOWN; }
    __device__ int row(int r) const { return ty * ROWS + r; }
    __device__ int column(int c) const { return tx * COLUMNS + c; }
    __device__ bool has(int r, int c) const { return here() && (EXACT || (row(r) < n && column(c) < n)); }

    // Calls `work(r, c)` for every number of the tile.
    template <class Work> static __device__ void each(Work work) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) work(r, c);
    }

    // The 1-norm times a power of two; of a lower triangular matrix, of which this is the transpose, by rows.
    __device__ R norm(R by, Board& board) const {
        constexpr bool OF_ROWS = STRUCTURE == LOWER;
        constexpr int MANY = OF_ROWS ? ROWS : COLUMNS, PARTIAL = OF_ROWS ? ACROSS : DOWN;
        R sums[MANY] = {};
        each([&](int r, int c) { sums[OF_ROWS ? r : c] = plus_magnitude(x[r][c], by, sums[OF_ROWS ? r : c]); });
        barrier();
        if (here())
#pragma unroll
            for (int s = 0; s < MANY; s++)
                board.partial[OF_ROWS ? tx : ty][OF_ROWS ? row(s) : column(s)] = sums[s];
        barrier();
        R largest = 0;
        for (int j = threadIdx.x; j < N; j += THREADS) {
            R sum = 0;
#pragma unroll
            for (int y = 0; y < PARTIAL; y++) sum += board.partial[y][j];
            largest = larger(largest, sum);
        }
        return largest_of(largest, board);
    }

    // Shows column c, before it is eliminated as the k-th.
    __device__ void show(int c, int k, Board& board) {
        Many<ROWS> put;
#pragma unroll
        for (int r = 0; r < ROWS; r++) put.v[r] = x[r][c];
        *(Many<ROWS>*)&board.column[k & 1][ty * ROWS] = put;
    }

    __device__ void eliminate(Board& board) {
        const int lane = threadIdx.x % 32;
        Word ids[SCANNED];  // 0 where a row has had its pivot
#pragma unroll
        for (int s = 0; s < SCANNED; s++) ids[s] = s * 32 + lane < n ? 128 - (s * 32 + lane) : 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) inverses[r] = number(0);
        if (tx == 0 && here()) show(0, 0, board);
        barrier();
#pragma unroll 1
        for (int kx = 0; kx < ACROSS; kx++) {
#pragma unroll
            for (int kc = 0; kc < COLUMNS; kc++) {
                const int k = kx * COLUMNS + kc;
                if (k >= n) break;
                const T* const column = board.column[k & 1];
                T* const line = board.line[k & 1];
                int p = k;
                if (PIVOTING) {
                    // Each warp by itself. The first of the largest: rows are told apart by the last bits of keys.
                    Word best = 0;
#pragma unroll
                    for (int s = 0; s < SCANNED; s++) {
                        Word key = 0;
                        if (N % 32 == 0 || s * 32 + lane < N) key = (size_word(column[s * 32 + lane]) & ~255u) | ids[s];
                        best = max(best, ids[s] ? key : 0);
                    }
                    best = most_of_warp(best);
                    p = 128 - (int)(best & 255);
                }
                const T chosen = column[p];
                if (is_zero(chosen) && !pivot) {
                    pivot = k + 1;
                    if (PIVOTING) {
                        bool some = false;
#pragma unroll
                        for (int s = 0; s < SCANNED; s++) some |= ids[s] && !is_zero(column[s * 32 + lane]);
                        lost = __any_sync(ALL, some);
                    }
                }
                if (PIVOTING) {
#pragma unroll
                    for (int s = 0; s < SCANNED; s++)
                        if (s * 32 + lane == p) ids[s] = 0;
                    if (threadIdx.x == 0) board.order[k] = p, board.step[p] = k;
                }
                if (ty == p / ROWS)
#pragma unroll
                    for (int r = 0; r < ROWS; r++)
                        if (r == p % ROWS) {
                            Many<COLUMNS> put;
#pragma unroll
                            for (int c = 0; c < COLUMNS; c++) put.v[c] = x[r][c];
                            *(Many<COLUMNS>*)&line[tx * COLUMNS] = put;
                        }
                const T inverse = reciprocal(chosen);
                Many<ROWS> factors = {};
                if (here()) factors = *(const Many<ROWS>*)&column[ty * ROWS];
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const bool its = row(r) == p;
                    // Below the pivots of a triangular matrix are zeros, be a pivot what it may.
                    factors.v[r] = its || (!PIVOTING && row(r) > k) ? number(0) : times(factors.v[r], inverse);
                    if (its) inverses[r] = inverse;
                }
                barrier();
                Many<COLUMNS> other = {};
                if (here()) other = *(const Many<COLUMNS>*)&line[tx * COLUMNS];
                // The next column first, for which others wait.
#pragma unroll
                for (int t = 0; t < COLUMNS; t++) {
                    const int c = (kc + 1 + t) % COLUMNS;
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        const T value = less_product(x[r][c], factors.v[r], other.v[c]);
                        x[r][c] = c != kc || tx != kx ? value : row(r) == p ? number(1) : minus(factors.v[r]);
                    }
                    if (t == 0 && tx == (kc + 1 < COLUMNS ? kx : kx + 1) && here()) show(c, k + 1, board);
                }
                barrier();
            }
        }
        each([&](int r, int c) { x[r][c] = has(r, c) ? times(x[r][c], inverses[r]) : number(0); });
    }

    // Subtracts the products of factors of rows and what others show of a row.
    __device__ void subtract(const T (&factors)[ROWS], const T* line) {
        Many<COLUMNS> other = {};
        if (here()) other = *(const Many<COLUMNS>*)&line[tx * COLUMNS];
        each([&](int r, int c) { x[r][c] = less_product(x[r][c], factors[r], other.v[c]); });
    }

    // Positive definite matrices, by the three parts that numbers.cuh names. What a row does not contribute is shown
    // as zeros.
    __device__ void invert_definite(Board& board) {
        int turns = 0;
        Pivots pivots;
        T factors[ROWS];
        // Shows what `choose(j, number)` makes of row r of the tiles that have row k.
        const auto show_row = [&](int k, int r, T* line, auto choose) {
            Many<COLUMNS> put;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) put.v[c] = choose(column(c), x[r][c]);
            if (ty == k / ROWS) *(Many<COLUMNS>*)&line[tx * COLUMNS] = put;
        };
        const auto rows_of = [&](const T* column) {
            Many<ROWS> values = {};
            if (here()) values = *(const Many<ROWS>*)&column[ty * ROWS];
            return values;
        };
        // Steps are unrolled until rows and columns are again where they were in their tiles.
        constexpr int STEPS = least_common_multiple(ROWS, COLUMNS);
#pragma unroll 1
        for (int base = 0; base < n; base += STEPS) {
#pragma unroll
            for (int u = 0; u < STEPS; u++) {
                const int k = base + u;
                if (k >= n) break;
                T* const line = board.line[turns++ & 1];
                show_row(k, u % ROWS, line, [&](int j, T a) { return j >= k ? a : number(0); });
                barrier();
                const R chosen = real(line[k]), inverse = reciprocal(chosen);
                pivots.look(k, chosen, inverse);
                if (threadIdx.x == 0) board.inverses[k] = inverse;
                const Many<ROWS> mine = rows_of(line);
                T kept[ROWS];  // of L: what is used, not what its mirror image would be
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    factors[r] = row(r) > k ? times(conj(mine.v[r]), inverse) : number(0);
                    kept[r] = row(r) > k ? factors[r] : x[r][u % COLUMNS];
                }
                subtract(factors, line);
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    if (tx == k / COLUMNS) x[r][u % COLUMNS] = kept[r];
            }
        }
#pragma unroll 1
        for (int base = (n - 1) / STEPS * STEPS; base >= 0; base -= STEPS) {
#pragma unroll
            for (int u = STEPS - 1; u >= 0; u--) {
                const int k = base + u, now = turns & 1;
                if (k >= n) continue;
                turns++;
                show_row(k, u % ROWS, board.line[now], [&](int j, T a) { return j < k ? a : number(0); });
                Many<ROWS> put;
#pragma unroll
                for (int r = 0; r < ROWS; r++) put.v[r] = x[r][u % COLUMNS];
                if (tx == k / COLUMNS && here()) *(Many<ROWS>*)&board.column[now][ty * ROWS] = put;
                barrier();
                const Many<ROWS> mine = rows_of(board.column[now]);
#pragma unroll
                for (int r = 0; r < ROWS; r++)  // 2: x - 2 x is -x
                    factors[r] = row(r) == k ? number(2) : row(r) > k ? mine.v[r] : number(0);
                subtract(factors, board.line[now]);
            }
        }
#pragma unroll 1
        for (int base = 0; base < n; base += STEPS) {
#pragma unroll
            for (int u = 0; u < STEPS; u++) {
                const int k = base + u;
                if (k >= n) break;
                T* const line = board.line[turns++ & 1];
                const auto of_row = [&](int j, T a) { return j < k ? a : number(j == k); };
                show_row(k, u % ROWS, line, of_row);
                barrier();
                const R inverse = board.inverses[k];
                const Many<ROWS> mine = rows_of(line);
#pragma unroll
                for (int r = 0; r < ROWS; r++) factors[r] = row(r) < k ? times(conj(mine.v[r]), -inverse) : number(0);
#pragma unroll
                for (int c = 0; c < COLUMNS; c++)
                    if (ty == k / ROWS) x[u % ROWS][c] = times(of_row(column(c), x[u % ROWS][c]), inverse);
                subtract(factors, line);
            }
        }
        barrier();
        pivot = pivots.unfit;
        lost = pivots.lost;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    per_block(const T* a, T* out, int* info, R* rconds, Word* overflows, Long m, int n) {
    Board& board = *(Board*)memory;
    for (Long q = blockIdx.x; q < m; q += gridDim.x) {
        const T* const source = a + q * n * n;
        T* const target = out + q * n * n;
        const auto stored = [&](int i, int j) { return source[i * n + j]; };
        Tile tile(n);
        auto& x = tile.x;
        if (EXACT && STRUCTURE == GENERAL && (size_t)a % alignof(Many<COLUMNS>) == 0) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                Many<COLUMNS> got = {};
                if (tile.here()) got = *(const Many<COLUMNS>*)(source + tile.row(r) * n + tile.column(0));
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) x[r][c] = got.v[c];
            }
        } else {
            Tile::each([&](int r, int c) {
                x[r][c] = tile.has(r, c) ? worked_on(tile.row(r), tile.column(c), stored) : number(0);
            });
        }
        Range range;
        Tile::each([&](int r, int c) { range.look(x[r][c]); });
        range = joined(range, board);
        const int shift = range.shift(), excess = range.excess();
        const R scale = F::power(shift);
        Tile::each([&](int r, int c) { x[r][c] = times(x[r][c], scale); });
        const R norm = tile.norm(F::power(-excess - SLACK), board);
        if (DEFINITE || TRIED) tile.invert_definite(board);
        const bool chosen = PIVOTING && !(TRIED && tile.pivot == 0 && !tile.lost);
        if (chosen && TRIED) {
            tile.pivot = 0;
            tile.lost = false;
            Tile::each([&](int r, int c) {
                x[r][c] = tile.has(r, c) ? times(given(tile.row(r), tile.column(c), stored), scale) : number(0);
            });
        }
        if (chosen || !(DEFINITE || TRIED)) tile.eliminate(board);
        if (MIRRORED) {
            Tile::each([&](int r, int c) {
                const int i = tile.row(r), j = tile.column(c);
                if (tile.has(r, c)) target[chosen ? board.step[i] * n + board.order[j] : i * n + j] = x[r][c];
            });
            barrier();
            const auto raw = [&](int i, int j) { return target[i * n + j]; };
            Tile::each([&](int r, int c) {
                if (tile.has(r, c)) x[r][c] = found(tile.row(r), tile.column(c), raw);
            });
        }
        Norm of_inverse(excess);
#pragma unroll 1
        for (int pass = 0;; pass++)
            if (!of_inverse.again(tile.norm(of_inverse.factor(), board), pass)) break;
        bool overflow = false;
        if (of_inverse.may_overflow(excess, shift)) {
            Tile::each([&](int r, int c) { overflow |= !is_finite(scaled(x[r][c], scale)); });
            overflow = largest_of(overflow, board) > 0;
        }
        const int pivot = tile.lost ? 0 : tile.pivot;
        const int code = info_of(range.finite(), pivot, overflow || tile.lost);
        if (threadIdx.x == 0)
            report(q, code, rcond_of(range.finite(), pivot, norm, of_inverse), info, rconds, overflows);
        const R by = code ? F::not_a_number() : scale;
        if (STRUCTURE == GENERAL) {
            // Row by row through shared memory, so that neighbours are written by neighbours.
            int columns[COLUMNS];
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) columns[c] = tile.has(0, c) ? board.order[tile.column(c)] : 0;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                barrier();
#pragma unroll
                for (int c = 0; c < COLUMNS; c++)
                    if (tile.has(r, c)) board.rows[tile.ty][columns[c]] = scaled(x[r][c], by);
                barrier();
                if (tile.here() && tile.row(r) < n) {
                    T* const to = target + board.step[tile.row(r)] * n;
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) {
                        const int j = tile.tx + ACROSS * c;
                        if (EXACT || j < n) to[j] = board.rows[tile.ty][j];
                    }
                }
            }
        } else {
            barrier();
            Tile::each([&](int r, int c) {
                const int i = tile.row(r), j = tile.column(c);
                if (tile.has(r, c)) target[STRUCTURE == LOWER ? j * n + i : i * n + j] = scaled(x[r][c], by);
            });
        }
        barrier();
    }
}
