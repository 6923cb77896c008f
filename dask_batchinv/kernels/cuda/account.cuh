// Bringing each matrix to unit size, its inverse back, and accounting for both: as kernels/cpu/scaling.py does it.

// Norms are smaller by so many powers of two than what they are of.
constexpr int SLACK = 32;

// The exponent of a number other than zero, mantissas in [1/2, 1), or the lowest, from its word.
static __device__ int exponent(Word high) { return (int)(high >> F::shift) - (F::highest - 2); }

// The numbers of a matrix: words of the largest and the smallest, zeros not counted.
struct Range {
    Word most = 0, least = ~0u;  // the latter less one, so that zeros are the largest

    __device__ void look(T a) {
#pragma unroll
        for (int k = 0; k < PARTS; k++) {
            Word word = F::high(part(a, k)) & 0x7fffffff;
            most = max(most, word);
            if (sizeof(R) == 8) word |= min(F::low(part(a, k)), 1u);
            least = min(least, word - 1);
        }
    }
    __device__ bool finite() const { return most < F::infinity; }
    // The exponent that brings the largest number into [1/2, 1), unless the smallest would become subnormal or the
    // power of two itself: either is then as near as it gets, which is near enough.
    __device__ int shift() const {
        const int wanted = max(-exponent(most), min(F::lowest - exponent(least + 1), 0));
        return min(max(wanted, F::lowest), 1 - F::lowest);
    }
    // The exponent that the largest number then still has, or most of it.
    __device__ int excess() const { return max(min(exponent(most) + shift(), -F::lowest - SLACK), 0); }
};

// Adds a magnitude times a power of two to a sum.
static __device__ R plus_magnitude(R a, R by, R sum) { return fma(fabs(a), by, sum); }
static __device__ R plus_magnitude(Complex<R> a, R by, R sum) {
    const R re = a.re * by, im = a.im * by;
    return sum + sqrt(fma(re, re, im * im));
}

// 1-norms: of the matrix without its excess, of the inverse with it, and both smaller by SLACK, so that no sum
// overflows unless rcond is 0. The squares of complex numbers may, or lose digits where they underflow: what a square
// loses is less than the root of the smallest number, and that must be less than eps of the norm. Of a matrix of unit
// size, neither happens.
struct Norm {
    R by, more = 1;  // by a second power of two where the first was wrong
    explicit __device__ Norm(int excess) : by(F::power(excess - SLACK)) {}
    R norm = 0;

    __device__ R factor() const { return by * more; }
    // Takes a norm; tells whether it must be found once more, with another factor.
    __device__ bool again(R found, int pass) {
        norm = found;
        if (PARTS == 1 || pass) return false;
        if (found > F::largest || found != found) more = F::power(-F::highest / 2);
        else if (found < F::power((F::lowest + F::digits + 1) / 2 + 1)) more = F::power(SLACK);
        else return false;
        return true;
    }
    // Whether a number of what it is the norm of might overflow when it is multiplied by a power of two.
    __device__ bool may_overflow(int excess, int shift) const {
        const int of_more = more == 1 ? 0 : more < 1 ? -F::highest / 2 : SLACK;
        return !(norm <= F::largest) || exponent(F::high(norm)) - of_more + SLACK - excess + shift >= F::highest;
    }
};

static __device__ int info_of(bool finite, int pivot, bool overflow) {
    return !finite ? INFO_NOT_FINITE : pivot ? pivot : overflow ? INFO_OVERFLOW : 0;
}

static __device__ R rcond_of(bool finite, int pivot, R norm, Norm of_inverse) {
    const R one = F::epsilon * F::power(-2 * SLACK);
    const R rcond = one / (F::epsilon * norm * of_inverse.norm) * of_inverse.more;
    return !finite ? F::not_a_number() : pivot || rcond != rcond ? R(0) : rcond;
}

// Writes the account of a matrix. `overflows`, if there is one, counts those that may be good in double precision.
static __device__ void report(Long q, int code, R rcond, int* info, R* rconds, Word* overflows) {
    info[q] = code;
    rconds[q] = rcond;
    if (code == INFO_OVERFLOW && overflows) atomicAdd(overflows, 1u);
}
