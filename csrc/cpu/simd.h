// One register of floats at a time: 16 with AVX-512, 8 with AVX2, 4 elsewhere. Wider vectors compile too, but a value
// here is meant to stay in a register.
//
// Included by sources that are compiled once per instruction set, each time into a namespace of its own (RLCORE_ISA),
// so that no function compiled for AVX-512 can be linked where a plain CPU calls it. Nothing here may be a template or
// an inline function of the standard library, for the same reason.
#pragma once

#include <cstdint>
#include <cstring>

namespace rlcore::cpu::RLCORE_ISA {

#if defined(__AVX512F__)
#define RLCORE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define RLCORE_VECTOR_BYTES 32
#else
#define RLCORE_VECTOR_BYTES 16
#endif

constexpr std::int64_t kLanes = RLCORE_VECTOR_BYTES / 4;

typedef float Floats __attribute__((vector_size(RLCORE_VECTOR_BYTES)));
typedef std::int32_t Ints __attribute__((vector_size(RLCORE_VECTOR_BYTES)));

#define RLCORE_INLINE static inline __attribute__((always_inline))

// x - 0 is x, also for -0, so that nothing is left of it but a load into all lanes; x + 0 would be computed.
RLCORE_INLINE Floats broadcast(float x) { return x - Floats{}; }

RLCORE_INLINE Floats load(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}

RLCORE_INLINE void store(float* p, Floats x) { std::memcpy(p, &x, sizeof(x)); }

// n < kLanes values, the other lanes hold `fill`.
RLCORE_INLINE Floats load_part(const float* p, std::int64_t n, float fill) {
    Floats x = broadcast(fill);
    std::memcpy(&x, p, static_cast<std::size_t>(n) * sizeof(float));
    return x;
}

RLCORE_INLINE void store_part(float* p, Floats x, std::int64_t n) {
    std::memcpy(p, &x, static_cast<std::size_t>(n) * sizeof(float));
}

RLCORE_INLINE Floats select(Ints condition, Floats yes, Floats no) {
    return reinterpret_cast<Floats>((condition & reinterpret_cast<Ints>(yes)) |
                                    (~condition & reinterpret_cast<Ints>(no)));
}

// The product as it is in float32: not contracted with what follows into a fused multiply-add, so that the same product
// elsewhere cancels against it exactly.
RLCORE_INLINE Floats rounded(Floats x) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(x));
#elif defined(__x86_64__)
    __asm__("" : "+x"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#endif
    return x;
}

// The larger one; a NaN in `x` stays, so that it reaches the result.
RLCORE_INLINE Floats larger(Floats x, Floats bound) { return select(x < bound, bound, x); }

RLCORE_INLINE float largest(Floats x) {
    float m = x[0];
    for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
    return m;
}

// Pairwise, in one fixed order.
RLCORE_INLINE double sum(Floats x) {
    double s[kLanes];
    for (int i = 0; i < kLanes; ++i) s[i] = static_cast<double>(x[i]);
    for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::int64_t i = 0; i < half; ++i) s[i] += s[i + half];
    }
    return s[0];
}

// e^x for x <= 88, relative error below 2^-22 (measured: 1.2e-7); 0 below -87.3, where the result would be subnormal.
//
// x = n log 2 + r with |r| <= log(2)/2; e^r by its Taylor polynomial of degree 7, whose remainder is 2e-9 there. The
// subtraction of n log 2 in two parts keeps r exact; adding 1.5 * 2^23 rounds x / log 2 to an integer.
RLCORE_INLINE Floats exp_of(Floats x) {
    const Floats lowest = broadcast(-87.33f);
    const Ints vanishes = x < lowest;
    x = larger(x, lowest);
    const Floats magic = broadcast(12582912.0f);
    const Floats shifted = x * 1.44269504088896341f + magic;
    const Floats n = shifted - magic;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * (1.0f / 5040) + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Ints exponent = ((reinterpret_cast<Ints>(shifted) - reinterpret_cast<Ints>(magic)) + 127) << 23;
    return select(vanishes, Floats{}, p * reinterpret_cast<Floats>(exponent));
}

// tanh x, relative error below 2^-21: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) loses its digits.
RLCORE_INLINE Floats tanh_of(Floats x) {
    const Ints sign = reinterpret_cast<Ints>(x) & static_cast<std::int32_t>(0x80000000);
    const Floats a = reinterpret_cast<Floats>(reinterpret_cast<Ints>(x) & 0x7fffffff);
    const Floats twice = select(a > 20.0f, broadcast(40.0f), a + a);
    const Floats far = 1.0f - 2.0f / (exp_of(twice) + 1.0f);
    const Floats s = a * a;
    Floats p = s * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    const Floats near = p * s * a + a;
    const Floats magnitude = select(a < 0.625f, near, far);
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(magnitude) | sign);
}

}  // namespace rlcore::cpu::RLCORE_ISA
