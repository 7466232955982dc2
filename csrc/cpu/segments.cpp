#include "cpu/segments.h"

#include <cmath>

namespace rlcore::cpu {
namespace {

// Below this many values (some 50 microseconds of one thread) the start of a thread team costs more than it saves.
constexpr std::int64_t kParallelValues = 1 << 18;

// Four running sums hide the latency of the addition; their fixed order keeps the result reproducible.
float ragged_sum(const float* x, std::int64_t stride, std::int64_t n) {
    double sum[4] = {0.0, 0.0, 0.0, 0.0};
    std::int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        for (std::int64_t lane = 0; lane < 4; ++lane) sum[lane] += x[(i + lane) * stride];
    }
    for (; i < n; ++i) sum[0] += x[i * stride];
    return static_cast<float>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

double ragged_sum(const double* x, std::int64_t stride, std::int64_t n) {
    double sum = 0.0;
    double lost = 0.0;
    for (std::int64_t i = 0; i < n; ++i) {
        const double value = x[i * stride];
        const double next = sum + value;
        lost += std::abs(sum) >= std::abs(value) ? (sum - next) + value : (value - next) + sum;
        sum = next;
    }
    // With an infinity in the data the compensation is inf - inf; the plain sum is the answer.
    return std::isfinite(lost) ? sum + lost : sum;
}

template <typename T>
void segment_sum_of(const T* values, std::int64_t stride, const std::int64_t* offsets, std::int64_t segments, T* out) {
    const std::int64_t total = segments > 0 ? offsets[segments] - offsets[0] : 0;
#pragma omp parallel for schedule(static) if (total >= kParallelValues)
    for (std::int64_t s = 0; s < segments; ++s) {
        const std::int64_t start = offsets[s];
        out[s] = ragged_sum(values + start * stride, stride, offsets[s + 1] - start);
    }
    (void)total;  // read by the pragma alone
}

}  // namespace

void segment_sum(const float* values, std::int64_t stride, const std::int64_t* offsets, std::int64_t segments,
                 float* out) {
    segment_sum_of(values, stride, offsets, segments, out);
}

void segment_sum(const double* values, std::int64_t stride, const std::int64_t* offsets, std::int64_t segments,
                 double* out) {
    segment_sum_of(values, stride, offsets, segments, out);
}

}  // namespace rlcore::cpu
