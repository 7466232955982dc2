// Reductions over the segments of a ragged axis.
#pragma once

#include <cstdint>

namespace rlcore::cpu {

// out[s] = sum of values[i * stride] over offsets[s] <= i < offsets[s + 1]; an empty segment gives 0.
//
// `stride` counts elements. A segment is summed by one thread in one fixed order, so the result does not depend on the
// number of threads. float sums in double and rounds once; double sums with Neumaier's compensation.
// Reads n values and S + 1 offsets, writes S results.
void segment_sum(const float* values, std::int64_t stride, const std::int64_t* offsets, std::int64_t segments,
                 float* out);
void segment_sum(const double* values, std::int64_t stride, const std::int64_t* offsets, std::int64_t segments,
                 double* out);

}  // namespace rlcore::cpu
