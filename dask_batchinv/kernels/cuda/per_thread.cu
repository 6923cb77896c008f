// One matrix per thread. The threads of a warp fetch and store theirs together, by way of shared memory.
//
//     WARPS  warps of a block

constexpr int NBYTES = N * N * (int)sizeof(T);
constexpr int BYTES = NBYTES % 16 == 0 ? 16 : NBYTES % 8 == 0 ? 8 : 4;  // that a thread moves at a time
constexpr int PIECES = NBYTES / BYTES;
constexpr int PITCH = (PIECES | 1) * BYTES;  // odd, so that the threads of a warp find their numbers in different banks
static_assert(SHARED == WARPS * 32 * PITCH, "launch.py has another layout");

// Copies the matrices of a warp: `move(in global memory, in shared memory)` for pieces of one type.
template <class Move> static __device__ void move_matrices(int count, bool aligned, unsigned char* global,
                                                           unsigned char* shared, Move move) {
    const int lane = threadIdx.x % 32;
    if (count == 32 && aligned) {
        // Where matrices stand without gaps, by 16 bytes, be a matrix a multiple of them or not.
        constexpr int K = PITCH == NBYTES ? 16 : BYTES, COUNT = 32 * NBYTES / K;
#pragma unroll
        for (int t = 0; t < (COUNT + 31) / 32; t++) {
            const int e = t * 32 + lane;
            if (COUNT % 32 == 0 || e < COUNT)
                move((Piece<K>*)(global + e * K),
                     (Piece<K>*)(shared + (PITCH == NBYTES ? e * K : e / PIECES * PITCH + e % PIECES * K)));
        }
        return;
    }
    constexpr int EACH = N * N * PARTS;
    for (int e = lane; e < count * EACH; e += 32)
        move((R*)global + e, (R*)(shared + e / EACH * PITCH) + e % EACH);
}

struct Matrix {
    T x[N][N];
    T inverses[N];      // of the pivots, by which rows are multiplied in the end
    Word columns[(N + 7) / 8] = {};  // where the columns of the inverse belong, in four bits each
    int pivot = 0;      // the number of the first that is unfit
    bool lost = false;  // whether that only comes from the key of its column, too coarse, or from an overflow

    __device__ int column(int k) const { return PIVOTING ? columns[k / 8] >> k % 8 * 4 & 15 : k; }

    __device__ void eliminate() {
        Word ids[N];
#pragma unroll
        for (int i = 0; i < N; i++) ids[i] = 15 - i;
#pragma unroll
        for (int k = 0; k < N; k++) {
            if (PIVOTING) {
                // The first of the largest: rows are told apart by the last bits of keys.
                Word keys[N], best = 0;
#pragma unroll
                for (int i = k; i < N; i++) {
                    keys[i] = (size_word(x[i][k]) & ~15u) | ids[i];
                    best = max(best, keys[i]);
                }
                columns[k / 8] |= (15 - (best & 15)) << k % 8 * 4;
#pragma unroll
                for (int i = k + 1; i < N; i++) {
                    const bool its = keys[i] == best;
                    ids[i] = its ? ids[k] : ids[i];
#pragma unroll
                    for (int j = 0; j < N; j++) {
                        const T old = x[k][j];
                        x[k][j] = its ? x[i][j] : old;
                        x[i][j] = its ? old : x[i][j];
                    }
                }
            }
            if (is_zero(x[k][k]) && !pivot) {
                pivot = k + 1;
                if (PIVOTING)
#pragma unroll
                    for (int i = k + 1; i < N; i++) lost |= !is_zero(x[i][k]);
            }
            inverses[k] = reciprocal(x[k][k]);
            if (STRUCTURE != DIAGONAL)
#pragma unroll
                for (int i = 0; i < (PIVOTING ? N : k); i++) {
                    if (i == k) continue;
                    const T factor = times(x[i][k], inverses[k]);
                    x[i][k] = minus(factor);
#pragma unroll
                    for (int j = PIVOTING ? 0 : k + 1; j < N; j++)
                        if (j != k) x[i][j] = less_product(x[i][j], factor, x[k][j]);
                }
            x[k][k] = number(1);
        }
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int j = 0; j < N; j++) x[i][j] = times(x[i][j], inverses[i]);
    }

    // Positive definite matrices, by the three parts that numbers.cuh names: in the lower triangle, in place.
    __device__ void invert_definite() {
        Pivots pivots;
#pragma unroll
        for (int k = 0; k < N; k++) {
            inverses[k] = number(reciprocal(real(x[k][k])));
            pivots.look(k, real(x[k][k]), real(inverses[k]));
#pragma unroll
            for (int i = k + 1; i < N; i++) {
                const T factor = times(x[i][k], real(inverses[k]));
#pragma unroll
                for (int j = k + 1; j <= i; j++) x[i][j] = less_product(x[i][j], factor, conj(x[j][k]));
            }
#pragma unroll
            for (int i = k + 1; i < N; i++) x[i][k] = times(x[i][k], real(inverses[k]));
        }
#pragma unroll
        for (int i = N - 1; i > 0; i--)
#pragma unroll
            for (int k = i; k > 0; k--)
#pragma unroll
                for (int j = 0; j < k; j++)
                    x[i][j] = i == k ? minus(x[i][j]) : less_product(x[i][j], x[i][k], x[k][j]);
#pragma unroll
        for (int i = 0; i < N; i++) {
            x[i][i] = number(1);
#pragma unroll
            for (int k = i; k < N; k++) {
                const T factor = times(conj(x[k][i]), k == i ? real(inverses[k]) : -real(inverses[k]));
#pragma unroll
                for (int j = 0; j <= i; j++)
                    x[i][j] = k == i ? times(x[i][j], factor) : less_product(x[i][j], factor, x[k][j]);
            }
        }
        pivot = pivots.unfit;
        lost = pivots.lost;
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    per_thread(const T* a, T* out, int* info, R* rconds, Word* overflows, Long m, int) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned char* const staged = memory + warp * (32 * PITCH);
    Piece<BYTES>* const mine = (Piece<BYTES>*)(staged + lane * PITCH);
    const bool aligned = ((size_t)a | (size_t)out) % 16 == 0;
    for (Long first = ((Long)blockIdx.x * WARPS + warp) * 32; first < m; first += (Long)gridDim.x * (32 * WARPS)) {
        const int count = (int)min((Long)32, m - first);
        move_matrices(count, aligned, (unsigned char*)(a + first * (N * N)), staged,
                      [](auto* global, auto* shared) { *shared = *global; });
        __syncwarp();

        Matrix matrix;
        auto& x = matrix.x;
        union Loaded {
            Piece<BYTES> pieces[PIECES];
            T x[N][N];
            __device__ Loaded() {}
        } loaded;
#pragma unroll
        for (int p = 0; p < PIECES; p++) loaded.pieces[p] = mine[p];
        const auto get = [&](int i, int j) { return loaded.x[i][j]; };
        Range range;
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int j = 0; j < N; j++) {
                x[i][j] = worked_on(i, j, get);
                if (STRUCTURE == GENERAL || i <= j) range.look(x[i][j]);
            }
        const int shift = range.shift(), excess = range.excess();
        const R scale = F::power(shift), of_matrix = F::power(-excess - SLACK);
        R norm = 0;
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int i = 0; i < N; i++) x[i][j] = times(x[i][j], scale);
#pragma unroll
        for (int j = 0; j < N; j++) {
            R sum = 0;
#pragma unroll
            for (int i = 0; i < N; i++) sum = plus_magnitude(STRUCTURE == LOWER ? x[j][i] : x[i][j], of_matrix, sum);
            norm = larger(norm, sum);
        }

        T* const numbers = (T*)mine;
        if (DEFINITE || TRIED) {
            matrix.invert_definite();
#pragma unroll
            for (int i = 0; i < N; i++)
#pragma unroll
                for (int j = i + 1; j < N; j++) x[i][j] = conj(x[j][i]);
        }
        if (!DEFINITE && !(TRIED && matrix.pivot == 0 && !matrix.lost)) {
            if (TRIED) {
                matrix = Matrix();
#pragma unroll
                for (int i = 0; i < N; i++)
#pragma unroll
                    for (int j = 0; j < N; j++)
                        x[i][j] = times(given(i, j, [&](int r, int c) { return numbers[r * N + c]; }), scale);
            }
            matrix.eliminate();
            if (PIVOTING && MIRRORED) {
                // By way of memory: where columns belong is known only when it runs.
#pragma unroll
                for (int i = 0; i < N; i++)
#pragma unroll
                    for (int j = 0; j < N; j++) numbers[i * N + matrix.column(j)] = x[i][j];
#pragma unroll
                for (int i = 0; i < N; i++)
#pragma unroll
                    for (int j = 0; j < N; j++) x[i][j] = numbers[i * N + j];
            }
        }
        const auto inverse = [&](int i, int j) { return x[i][j]; };
        Norm of_inverse(excess);
#pragma unroll 1
        for (int pass = 0;; pass++) {
            const R by = of_inverse.factor();
            R largest = 0;
#pragma unroll
            for (int j = 0; j < N; j++) {
                R sum = 0;
#pragma unroll
                for (int i = 0; i < N; i++) sum = plus_magnitude(found(i, j, inverse), by, sum);
                largest = larger(largest, sum);
            }
            if (!of_inverse.again(largest, pass)) break;
        }
        bool overflow = false;
        if (of_inverse.may_overflow(excess, shift))
#pragma unroll
            for (int i = 0; i < N; i++)
#pragma unroll
                for (int j = 0; j < N; j++) overflow |= !is_finite(scaled(found(i, j, inverse), scale));
        const int pivot = matrix.lost ? 0 : matrix.pivot;
        const int code = info_of(range.finite(), pivot, overflow || matrix.lost);
        if (lane < count)
            report(first + lane, code, rcond_of(range.finite(), pivot, norm, of_inverse), info, rconds, overflows);
        const R by = code ? F::not_a_number() : scale;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int to = MIRRORED ? j : matrix.column(j);
#pragma unroll
            for (int i = 0; i < N; i++) numbers[i * N + to] = scaled(found(i, j, inverse), by);
        }
        __syncwarp();
        move_matrices(count, aligned, (unsigned char*)(out + first * (N * N)), staged,
                      [](auto* global, auto* shared) { *global = *shared; });
        __syncwarp();
    }
}
