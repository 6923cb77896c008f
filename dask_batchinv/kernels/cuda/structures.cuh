// What is read of a matrix, what of it is eliminated, and how the inverse comes from that.

enum Structure { GENERAL, SYMMETRIC, HERMITIAN, UPPER, LOWER, DIAGONAL };

constexpr bool MIRRORED = STRUCTURE == SYMMETRIC || STRUCTURE == HERMITIAN;
// Whether matrices are taken for positive definite ones first, as many are: their inverses are good from both sides,
// which the mean of an inverse and its mirror image need not be where a matrix is nearly singular.
constexpr bool TRIED = MIRRORED && !DEFINITE && (PARTS == 1 || STRUCTURE == HERMITIAN);
constexpr bool PIVOTING = STRUCTURE == GENERAL || (MIRRORED && !DEFINITE);

// What a matrix is of which only the part is read that its structure names.
template <class Get> static __device__ T given(int i, int j, Get get) {
    switch (STRUCTURE) {
        case SYMMETRIC: return get(min(i, j), max(i, j));
        case HERMITIAN: {
            const T one = get(min(i, j), max(i, j));
            return i == j ? number(real(one)) : i < j ? one : conj(one);
        }
        case UPPER: return i <= j ? get(i, j) : number(0);
        case LOWER: return i >= j ? get(i, j) : number(0);
        case DIAGONAL: return i == j ? get(i, i) : number(0);
        default: return get(i, j);
    }
}

// The matrix that is eliminated: of a lower triangular one the transpose, so that its pivots are its diagonal.
template <class Get> static __device__ T worked_on(int i, int j, Get get) {
    return STRUCTURE == LOWER ? given(j, i, get) : given(i, j, get);
}

// The inverse, from that of what was worked on.
template <class Get> static __device__ T found(int i, int j, Get get) {
    switch (STRUCTURE) {
        // Not one triangle for both: the error of an inverse is small as a whole, not that of its halves put together.
        case SYMMETRIC: return mean(get(i, j), get(j, i));
        case HERMITIAN: return DEFINITE ? given(i, j, get) : mean(get(i, j), conj(get(j, i)));
        case LOWER: return i >= j ? get(j, i) : number(0);
        default: return given(i, j, get);
    }
}
