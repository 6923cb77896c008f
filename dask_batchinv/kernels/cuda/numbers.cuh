// The inverse of every matrix in a stack, with an account of each: the contract is in kernels/__init__.py.
//
// This file, structures.cuh and account.cuh, and for the last two in_memory.cuh, go before that of each layout:
//
//     per_thread.cu  one matrix per thread, in its registers
//     per_warp.cu    a matrix in the registers of some lanes of a warp, several rows per lane
//     per_block.cu   one matrix per block: a tile of it in the registers of each thread
//     memory.cu      one positive definite matrix per block, of any size, in global memory
//     cublas.cu      what goes before and after cuBLAS, which does the others
//
// and are compiled with it, for one dtype, size and kind of matrix at a time, as launch.py says:
//
//     NUMBER     float, double, Complex<float> or Complex<double>
//     N          in the first three, the size of the matrices; in per_block.cu a multiple of a tile's that is not less
//     STRUCTURE  one of Structure
//     DEFINITE   1 for positive definite matrices, which are HERMITIAN, else 0
//     SHARED     the bytes of shared memory that a block is given
//     INFO_…     the codes of Info in outcome.py
//
// All but positive definite matrices are eliminated by Gauss-Jordan in place, with partial pivoting, rows never exchanged
// in memory; triangular ones without. The row of a pivot keeps its numbers until the end, when it is multiplied by the
// pivot's reciprocal: nobody has to wait for that in between.
//
// Positive definite ones are inverted in three parts. (1) A = L D Lᴴ, where L is lower triangular with ones on its
// diagonal, from the upper triangle of A; the pivots in D are the squares of Cholesky's. (2) Y = L⁻¹ from Y L = I, each
// row by itself, from its diagonal to the left. (3) X = Yᴴ D⁻¹ Y, row after row of Y. Eliminating them as others are, or
// (2) from L Y = I, costs smooth covariances all their digits: both residuals grow with the condition of leading blocks.

typedef long long Long;
typedef unsigned Word;

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
    static constexpr int highest = 128;
    static constexpr int digits = 23;
    static constexpr float largest = 3.402823466e+38f;
    static constexpr float epsilon = 1.1920928955078125e-7f;
    // The word of a number that has its sign and exponent, where the exponent begins in it, and infinity's.
    static constexpr int shift = 23;
    static constexpr Word infinity = 0x7f800000;
    static __device__ Word high(float a) { return __float_as_uint(a); }
    static __device__ Word low(float) { return 0; }
    static __device__ float not_a_number() { return __uint_as_float(0x7fc00000); }
    static __device__ float power(int k) { return __uint_as_float((Word)(k + 127) << 23); }
};
template <> struct Format<double> {
    static constexpr int lowest = -1021;
    static constexpr int highest = 1024;
    static constexpr int digits = 52;
    static constexpr double largest = 1.7976931348623157e+308;
    static constexpr double epsilon = 2.220446049250313e-16;
    static constexpr int shift = 20;
    static constexpr Word infinity = 0x7ff00000;
    static __device__ Word high(double a) { return (Word)__double2hiint(a); }
    static __device__ Word low(double a) { return (Word)__double2loint(a); }
    static __device__ double not_a_number() { return __hiloint2double(0x7ff80000, 0); }
    static __device__ double power(int k) { return __hiloint2double((k + 1023) << 20, 0); }
};
typedef Format<R> F;

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
// a b, of which every zero is positive, one that underflows too
static __device__ R scaled(R a, R b) { return a * b + R(0); }
static __device__ Complex<R> scaled(Complex<R> a, R b) { return {scaled(a.re, b), scaled(a.im, b)}; }
static __device__ R mean(R a, R b) { return a * R(0.5) + b * R(0.5); }
static __device__ Complex<R> mean(Complex<R> a, Complex<R> b) { return {mean(a.re, b.re), mean(a.im, b.im)}; }

// a - b c
static __device__ R less_product(R a, R b, R c) { return fma(-b, c, a); }
static __device__ Complex<R> less_product(Complex<R> a, Complex<R> b, Complex<R> c) {
    return {fma(b.im, c.im, fma(-b.re, c.re, a.re)), fma(-b.im, c.re, fma(-b.re, c.im, a.im))};
}

// 1 / a; but NaN of infinity, of which 0 would hide that it comes from an overflow.
static __device__ R reciprocal(R a) { return R(1) / a + (a - a); }
static __device__ Complex<R> reciprocal(Complex<R> a) {
    // Smith's: does not underflow on the way, and overflows at the end of the range alone.
    if (fabs(a.re) >= fabs(a.im)) {
        const R ratio = a.im / a.re, divisor = fma(a.im, ratio, a.re);
        return {reciprocal(divisor), -ratio / divisor};
    }
    const R ratio = a.re / a.im, divisor = fma(a.re, ratio, a.im);
    return {ratio / divisor, -reciprocal(divisor)};
}

static __device__ bool is_zero(T a) { return part(a, 0) == 0 && part(a, PARTS - 1) == 0; }
static __device__ bool is_finite(T a) {
    return fabs(part(a, 0)) <= F::largest && fabs(part(a, PARTS - 1)) <= F::largest;
}

// Orders numbers by what LAPACK chooses pivots by: the word of it that has the exponent, so nearly. NaN counts as more
// than infinity: then the result overflows, as it should. Of the lowest bits the caller makes other use.
static __device__ Word size_word(T a) {
    return PARTS == 2 ? F::high(fabs(part(a, 0)) + fabs(part(a, PARTS - 1))) : F::high(real(a)) & 0x7fffffff;
}

// The first pivot of a positive definite matrix that says something: that it is none, or that its reciprocal overflows,
// after which no pivot means anything.
struct Pivots {
    int unfit = 0;
    bool lost = false;

    __device__ void look(int k, R pivot, R inverse) {
        if (unfit || lost) return;
        if (pivot <= 0) unfit = k + 1;
        else lost = !(inverse <= F::largest);
    }
};

// The larger of two sums of magnitudes; NaN is the largest of all, so that it is not lost.
static __device__ R larger(R a, R b) { return a > b || a != a ? a : b; }

constexpr Word ALL = 0xffffffff;  // lanes of a warp

// K bytes that are moved at a time.
template <int K> struct alignas(K) Piece {
    Word words[K / 4];
};

extern __shared__ __align__(16) unsigned char memory[];
