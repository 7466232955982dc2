// Reverse scans over packed sequences and advantages by groups, in one launch each. The counterpart of cpu/segments.h.
#pragma once

#include <cstdint>

namespace rlcore::cuda {

// One number for all rows, of the host (rows null) or on the device (stride 0), or one per row (stride 1).
template <typename T>
struct PerRow {
    const T* rows;
    std::int64_t stride;
    T number;
};

// The time axis: offsets [count + 1]; masked rows are removed from time and their results are 0. bootstrap [count] is
// the value behind each sequence's end, null for 0. All pointers are to device memory.
template <typename T>
struct Time {
    const std::int64_t* offsets;
    std::int64_t count;
    const std::uint8_t* mask;
    const T* bootstrap;
};

// y[i] = delta[i] + decay[i] * y[i + 1]. Each returns a cudaError_t.
template <typename T>
int reverse_scan(const Time<T>& time, const T* delta, const PerRow<T>& decay, T* y, void* stream);

template <typename T>
int gae(const Time<T>& time, const T* reward, const T* value, const PerRow<T>& gamma, const PerRow<T>& lam,
        T* advantage, T* returns, void* stream);

template <typename T>
int vtrace(const Time<T>& time, const T* reward, const T* value, const T* log_ratio, const PerRow<T>& gamma,
           const PerRow<T>& lam, T rho_bar, T c_bar, T* advantage, T* returns, void* stream);

enum class Center { none, group, leave_one_out, batch };
enum class Scale { none, group, batch };

// (reward - b) / (sigma + eps) as rlcore.algorithms.segments.group_advantage defines it, for n rewards with group ids
// of any values and order. The deviation is that of the rewards, or of the residuals; of these not over the batch while
// the centre is the group: that takes a second call, on the residuals.
struct Advantage {
    const double* reward;
    const std::int64_t* group;  // null where no scope is a group
    const double* weight;       // null for ones
    const std::uint8_t* mask;   // null: all count
    std::int64_t n;             // at most kMostRewards
    Center center;
    Scale scale;
    bool spread_of_residual;
    double ddof;
    double eps;
    double* out;
};

// Every reward is compared with every other: 2^28 comparisons in each of two or three sweeps.
constexpr std::int64_t kMostRewards = 1 << 14;

int group_advantage(const Advantage& job, void* stream);

}  // namespace rlcore::cuda
