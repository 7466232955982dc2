// Reductions, advantages and reverse scans over the segments of a ragged axis.
//
// float and double in; sums, statistics and scans run in double and are rounded once. Every segment is worked off by
// one thread in one fixed order, so no result depends on the number of threads.
#pragma once

#include <cstdint>

namespace rlcore::cpu {

// out[s] = sum of values[i * stride] over offsets[s] <= i < offsets[s + 1]; an empty segment gives 0.
//
// `stride` counts elements. float sums in double and rounds once; double sums with Neumaier's compensation.
// Reads n values and S + 1 offsets, writes S results.
void segment_sum(const float* values, std::int64_t stride, const std::int64_t* offsets, std::int64_t segments,
                 float* out);
void segment_sum(const double* values, std::int64_t stride, const std::int64_t* offsets, std::int64_t segments,
                 double* out);

// Which segment a row is in: `offsets` [count + 1], or `ids` [rows] from 0 to count - 1. Rows whose mask is 0 are in
// none (mask null: all count).
struct Segments {
    const std::int64_t* offsets;
    const std::int64_t* ids;
    const std::uint8_t* mask;
    std::int64_t rows;
    std::int64_t count;

    bool keeps(std::int64_t i) const { return mask == nullptr || mask[i] != 0; }
};

enum class Reduce { sum, mean, deviation, minimum, maximum };

// An empty segment gives 0, minimum inf, maximum -inf; a deviation of n <= ddof values is 0. NaN goes through.
template <typename T>
void segment_reduce(Reduce what, const T* x, const Segments& segments, std::int64_t ddof, T* out, int threads);

void segment_count(const Segments& segments, std::int64_t* out, int threads);

// Place of each row in its segment by falling value, NaN first, equal values in the order of their rows; -1 if masked.
template <typename T>
void segment_rank(const T* x, const Segments& segments, std::int64_t* rank, int threads);

// The k largest of each segment, [count, k], and their rows; -inf and -1 where there are fewer.
template <typename T>
void segment_topk(const T* x, const Segments& segments, std::int64_t k, T* values, std::int64_t* rows, int threads);

enum class Center { none, group, leave_one_out, batch };
enum class Scale { none, group, batch };

struct Advantage {
    Center center;
    Scale scale;
    bool spread_of_residual;
    double ddof;
    double eps;
};

// (reward - b) / (sigma + eps) as rlcore.algorithms.segments.group_advantage defines it; group ids are any integers
// (null where no scope is "group"), weight null for ones.
void group_advantage(const double* reward, const std::int64_t* group, const double* weight, const std::uint8_t* mask,
                     std::int64_t n, const Advantage& rule, double* out);

// One number for all rows (rows null), or one per row.
template <typename T>
struct PerRow {
    const T* rows;
    double number;

    double at(std::int64_t i) const { return rows == nullptr ? number : static_cast<double>(rows[i]); }
};

// The time axis: offsets [count + 1]; masked rows are removed from time and their results are 0. bootstrap [count] is
// the value behind each sequence's end, null for 0.
template <typename T>
struct Time {
    const std::int64_t* offsets;
    std::int64_t count;
    const std::uint8_t* mask;
    const T* bootstrap;
    int threads;
};

// y[i] = delta[i] + decay[i] * y[i + 1]
template <typename T>
void reverse_scan(const Time<T>& time, const T* delta, const PerRow<T>& decay, T* y);

template <typename T>
void gae(const Time<T>& time, const T* reward, const T* value, const PerRow<T>& gamma, const PerRow<T>& lam,
         T* advantage, T* returns);

template <typename T>
void vtrace(const Time<T>& time, const T* reward, const T* value, const T* log_ratio, const PerRow<T>& gamma,
            const PerRow<T>& lam, double rho_bar, double c_bar, T* advantage, T* returns);

// y[i] = delta[i] + decay[i] * y[i + 1], cut after rows that are `last`.
void linear_scan(const double* delta, const double* decay, const std::uint8_t* last, std::int64_t n, double* y,
                 int threads);

}  // namespace rlcore::cpu
