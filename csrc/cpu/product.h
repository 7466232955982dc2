// Products of small matrices in registers, and what becomes of them where numbers are not finite.
//
// Included by sources that are compiled once per instruction set, like simd.h.
#pragma once

#include "cpu/simd.h"

namespace rlcore::cpu::RLCORE_ISA {
namespace {

// The registers hold 4 vectors x 6 rows of sums where there are 32, 2 x 8 where there are 16.
constexpr int kRows = 6;

// C [rows, vectors] = A [rows, count] B [count, vectors], or C += A B. A is read one number at a time and may have any
// strides, so that it can be transposed; B and C are rows of vectors.
struct Product {
    const float* a;
    std::int64_t row;  // strides of a
    std::int64_t step;
    std::int64_t count;
    const float* b;
    std::int64_t b_pitch;
    float* c;
    std::int64_t c_pitch;
};

template <int R, int N, bool kAdd>
RLCORE_INLINE void block(const Product& p, std::int64_t first, std::int64_t column) {
    const float* a = p.a + first * p.row;
    const float* b = p.b + column;
    float* c = p.c + first * p.c_pitch + column;
    Floats sum[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[r][n] = kAdd ? load(c + r * p.c_pitch + n * kLanes) : Floats{};
    }
    for (std::int64_t t = 0; t < p.count; ++t) {
        Floats x[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) x[n] = load(b + t * p.b_pitch + n * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Floats y = broadcast(a[r * p.row + t * p.step]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[r][n] += y * x[n];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) store(c + r * p.c_pitch + n * kLanes, sum[r][n]);
    }
}

template <int N, bool kAdd>
void columns(const Product& p, std::int64_t rows, std::int64_t column) {
    constexpr int R = N > 2 ? kRows : 8;
    std::int64_t r = 0;
    for (; r + R <= rows; r += R) block<R, N, kAdd>(p, r, column);
    for (; r + 4 <= rows; r += 4) block<4, N, kAdd>(p, r, column);
    for (; r + 2 <= rows; r += 2) block<2, N, kAdd>(p, r, column);
    for (; r < rows; ++r) block<1, N, kAdd>(p, r, column);
}

template <bool kAdd>
void multiply(const Product& p, std::int64_t rows, std::int64_t vectors) {
    std::int64_t n = 0;
#if defined(__AVX512F__)
    for (; n + 4 <= vectors; n += 4) columns<4, kAdd>(p, rows, n * kLanes);
    if (n + 3 == vectors) {
        columns<3, kAdd>(p, rows, n * kLanes);
        return;
    }
#endif
    for (; n + 2 <= vectors; n += 2) columns<2, kAdd>(p, rows, n * kLanes);
    if (n < vectors) columns<1, kAdd>(p, rows, n * kLanes);
}

// The same for numbers that may not be finite: a weight of 0, in A or else in B, takes nothing of them, though 0 * NaN
// is NaN. Slow, and rarely there.
void multiply_weighted(const Product& p, std::int64_t rows, std::int64_t vectors, bool weights_in_a, bool add) {
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t n = 0; n < vectors; ++n) {
            float* c = p.c + r * p.c_pitch + n * kLanes;
            Floats sum = add ? load(c) : Floats{};
            for (std::int64_t t = 0; t < p.count; ++t) {
                const Floats y = broadcast(p.a[r * p.row + t * p.step]);
                const Floats x = load(p.b + t * p.b_pitch + n * kLanes);
                sum += select((weights_in_a ? y : x) == 0.0f, Floats{}, y * x);
            }
            store(c, sum);
        }
    }
}

// One operand holds weights that are 0 where a row must not be seen. Only clean operands, all of them finite, leave it
// to the product that 0 takes nothing.
void weigh(const Product& p, std::int64_t rows, std::int64_t vectors, bool clean, bool weights_in_a, bool add) {
    if (!clean) {
        multiply_weighted(p, rows, vectors, weights_in_a, add);
    } else if (add) {
        multiply<true>(p, rows, vectors);
    } else {
        multiply<false>(p, rows, vectors);
    }
}

// Whether [rows, columns] are finite numbers, all of them: x * 0 is NaN otherwise. Columns: a multiple of kLanes, or
// the pitch.
bool finite(const float* x, std::int64_t rows, std::int64_t columns, std::int64_t pitch) {
    if (columns == pitch) {
        columns *= rows;
        rows = 1;
    }
    // Four sums, or every addition would wait for the one before.
    Floats zeros[4] = {};
    float rest = 0.0f;
    for (std::int64_t r = 0; r < rows; ++r) {
        const float* at = x + r * pitch;
        std::int64_t c = 0;
        for (; c + 4 * kLanes <= columns; c += 4 * kLanes) {
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) zeros[n] += load(at + c + n * kLanes) * 0.0f;
        }
        for (; c + kLanes <= columns; c += kLanes) zeros[0] += load(at + c) * 0.0f;
        for (; c < columns; ++c) rest += at[c] * 0.0f;
    }
    return sum((zeros[0] + zeros[1]) + (zeros[2] + zeros[3])) + static_cast<double>(rest) == 0.0;
}

}  // namespace
}  // namespace rlcore::cpu::RLCORE_ISA
