// Row passes over a chunk of logits in float32: statistics, and logits -> d logits in place.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace rlcore::cpu {

// A chunk of raw logits a, rows x columns, unit stride along a row; z = cap * tanh(scale * a / cap) / temperature
// (cap 0: no softcap, z = scale * a / temperature).
struct Logits {
    float* data;
    std::int64_t row_stride;
    std::int64_t rows;
    std::int64_t columns;
    const std::int64_t* target;       // [rows]
    const float* temperature;         // [1] or [rows]
    std::int64_t temperature_stride;  // 0 or 1
    float scale;
    float cap;
};

// Per row: the maximum of z, log sum exp(z - maximum), the target's log-prob, the entropy.
struct Statistics {
    float* maximum;
    float* log_sum;
    float* logp;
    float* entropy;  // null: not asked for
};

struct Coefficients {
    const float* logp;     // [rows] d loss / d logp
    const float* entropy;  // [rows] d loss / d entropy, or null
};

}  // namespace rlcore::cpu

// Pass 1. Reads the chunk once; where z differs from a, writes back what pass 2 starts from: z, or with a softcap
// tanh(scale * a / cap), whose slope 1 - tanh^2 can not be made again from z. A label outside [0, columns) gives NaN.
// A row belongs to one thread: the result does not depend on their number.
RLCORE_KERNEL(void statistics(const Logits& chunk, const Statistics& out, int threads))

// Pass 2. Row keep[i] (i where keep is null), of what pass 1 left (raw: of raw logits), becomes row i of
//     d loss / d a_v = (d_logp (1[v = y] - p_v) - d_entropy p_v (log p_v + H)) dz/da
// in the same memory. keep rises, so rows move only towards the front.
RLCORE_KERNEL(void gradient(const Logits& chunk, const Statistics& of, const Coefficients& d, const std::int64_t* keep,
                            std::int64_t kept, bool raw, int threads))
