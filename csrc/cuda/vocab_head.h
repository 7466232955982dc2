// Row passes over a chunk of logits on the GPU: statistics, and logits -> d logits. The counterpart of
// cpu/vocab_head.h; here pass 1 writes nothing back, since memory is what both passes wait for.
#pragma once

#include <cstdint>

namespace rlcore::cuda {

enum class Type { float32, bfloat16, float16 };

// A number that the host knows, or one that lies on the device (elements `stride` apart for one per row): neither waits
// for the other.
struct Number {
    const float* rows;
    std::int64_t stride;
    float value;  // where `rows` is null
};

// A chunk of raw logits a, rows x columns, unit stride along a row;
// z = cap * tanh(scale * (a + bias) / cap) / temperature (without a softcap z = scale * (a + bias) / temperature). All
// pointers are to device memory.
struct Logits {
    const void* data;
    Type type;
    std::int64_t row_stride;  // in elements
    std::int64_t rows;
    std::int64_t columns;        // at most kMostColumns
    const std::int64_t* target;  // [rows]
    const float* bias;           // [columns] or null
    Number temperature;
    Number scale;
    bool capped;
    Number cap;
};

constexpr std::int64_t kMostColumns = 1 << 30;

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

// Where d logits go: the logits' own memory (same stride in bytes: of fewer bits, the front of each row), or elsewhere.
struct Output {
    void* data;
    Type type;
    std::int64_t row_stride;
};

// Pass 1. A label outside [0, columns) gives a log-prob of NaN. Returns a cudaError_t.
int statistics(const Logits& chunk, const Statistics& out, void* stream);

// Pass 2: d loss / d a_v = (d_logp (1[v = y] - p_v) - d_entropy p_v (log p_v + H)) dz/da, from raw logits. A row whose
// log-prob is NaN gets NaN; one whose label is not in [0, columns) for another reason (it is another shard's) has no y
// here. float32 logits to any type, 16-bit logits to their own type; -1 for other pairs.
int gradient(const Logits& chunk, const Statistics& of, const Coefficients& d, const Output& out, void* stream);

}  // namespace rlcore::cuda
