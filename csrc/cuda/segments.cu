// Reverse scans and advantages by groups.
//
// The maths of the scans: going back in time, a row maps a state (A, V), the sum so far and the value of the next row,
//     A' = p + q V + s A        V' = v + u V
// with  reverse_scan  p = delta, s = decay, q = v = 0, u = 1
//       gae           p = reward - value, q = gamma, s = gamma lam, v = value, u = 0
//       vtrace        p = rho (reward - value), q = rho gamma, s = gamma lam c, v = value, u = 0
// and the identity for a masked row. Two such maps after each other are one more, so that a tile of rows is a scan over
// maps: each thread composes those of its rows, a warp and the block scan the results, and each thread walks its rows
// again, in registers, from the state that reaches it. Numbers are those of the inputs, float or double.
//
// Memory traffic: each input is read once and each output written once: 16 bytes per row and sequence of float for gae.
//
// Launch: a block of 256 threads per sequence, four rows per thread and tile, tiles from the sequence's end to its
// beginning. What a tile hands on is one state in registers; its maps go through one of two sets of shared memory in
// turn, so that one barrier per tile is enough. Hundreds of sequences fill a GPU; a few long ones do not, which was
// taken for the sake of one launch and of a fixed order.
//
// Advantages compare every reward with every other, 256 at a time from shared memory, so that groups need no order and
// no ids from 0 on, and each sum runs in the order of the rewards. A minibatch has hundreds to thousands of them.
#include "cuda/segments.h"

#include <math.h>

#include "cuda/device.h"

namespace rlcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kEach = 4;
constexpr int kTile = kThreads * kEach;

template <typename T>
struct State {
    T sum, value;
};

template <typename T>
struct Map {
    T p, q, s, v, u;
};

template <typename T>
RLCORE_DEVICE Map<T> identity() {
    return {0, 0, 1, 0, 1};
}

template <typename T>
RLCORE_DEVICE State<T> applied(const Map<T>& m, const State<T>& x) {
    return {m.p + m.q * x.value + m.s * x.sum, m.v + m.u * x.value};
}

// First `later` (in time), then `sooner`.
template <typename T>
RLCORE_DEVICE Map<T> composed(const Map<T>& sooner, const Map<T>& later) {
    return {sooner.p + sooner.q * later.v + sooner.s * later.p, sooner.q * later.u + sooner.s * later.q,
            sooner.s * later.s, sooner.v + sooner.u * later.v, sooner.u * later.u};
}

template <typename T>
RLCORE_DEVICE Map<T> from_lane_below(const Map<T>& m, unsigned distance) {
    return {__shfl_up_sync(kAllLanes, m.p, distance), __shfl_up_sync(kAllLanes, m.q, distance),
            __shfl_up_sync(kAllLanes, m.s, distance), __shfl_up_sync(kAllLanes, m.v, distance),
            __shfl_up_sync(kAllLanes, m.u, distance)};
}

template <typename T>
RLCORE_DEVICE T at(const PerRow<T>& x, std::int64_t i) {
    return x.rows == nullptr ? x.number : x.rows[i * x.stride];
}

template <typename T>
struct ScanRows {
    const T* delta;
    PerRow<T> decay;
    T* y;

    __device__ State<T> begin(T end) const { return {end, 0}; }
    __device__ Map<T> map(std::int64_t i) const { return {delta[i], 0, at(decay, i), 0, 1}; }
    __device__ void write(std::int64_t i, const Map<T>&, const State<T>&, const State<T>& after) const {
        y[i] = after.sum;
    }
    __device__ void write_masked(std::int64_t i) const { y[i] = 0; }
};

template <typename T>
struct GaeRows {
    const T* reward;
    const T* value;
    PerRow<T> gamma;
    PerRow<T> lam;
    T* advantage;
    T* returns;

    __device__ State<T> begin(T end) const { return {0, end}; }
    __device__ Map<T> map(std::int64_t i) const {
        const T g = at(gamma, i);
        return {reward[i] - value[i], g, g * at(lam, i), value[i], 0};
    }
    __device__ void write(std::int64_t i, const Map<T>& m, const State<T>&, const State<T>& after) const {
        advantage[i] = after.sum;
        returns[i] = after.sum + m.v;
    }
    __device__ void write_masked(std::int64_t i) const { advantage[i] = returns[i] = 0; }
};

template <typename T>
struct VtraceRows {
    const T* reward;
    const T* value;
    const T* log_ratio;
    PerRow<T> gamma;
    PerRow<T> lam;
    T rho_bar;
    T c_bar;
    T* advantage;
    T* returns;

    __device__ State<T> begin(T end) const { return {0, end}; }
    __device__ Map<T> map(std::int64_t i) const {
        const T ratio = exp(log_ratio[i]);
        const T rho = ratio > rho_bar ? rho_bar : ratio;
        const T c = ratio > c_bar ? c_bar : ratio;
        const T g = at(gamma, i);
        return {rho * (reward[i] - value[i]), rho * g, g * at(lam, i) * c, value[i], 0};
    }
    // The target of the row behind is its value and the sum that follows it.
    __device__ void write(std::int64_t i, const Map<T>& m, const State<T>& before, const State<T>& after) const {
        advantage[i] = m.p + m.q * (before.value + before.sum);
        returns[i] = after.sum + m.v;
    }
    __device__ void write_masked(std::int64_t i) const { advantage[i] = returns[i] = 0; }
};

template <typename T>
struct ScanShared {
    Map<T> warps[2][kWarps];
};

template <typename T, typename Rows>
__global__ void __launch_bounds__(kThreads) scan_kernel(Time<T> time, Rows rows) {
    RLCORE_SHARED(ScanShared<T>, shared);
    const std::int64_t sequence = blockIdx.x;
    const std::int64_t start = time.offsets[sequence];
    State<T> carry = rows.begin(time.bootstrap == nullptr ? 0 : time.bootstrap[sequence]);
    int turn = 0;
    for (std::int64_t end = time.offsets[sequence + 1]; end > start; end -= kTile, turn = 1 - turn) {
        // Rows first, first - 1, ... are this thread's.
        const std::int64_t first = end - 1 - thread_of_block() * kEach;
        Map<T> maps[kEach];
        bool keep[kEach];
        Map<T> mine = identity<T>();
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
            const std::int64_t i = first - k;
            keep[k] = i >= start && (time.mask == nullptr || time.mask[i] != 0);
            maps[k] = keep[k] ? rows.map(i) : identity<T>();
            mine = composed(maps[k], mine);
        }
#pragma unroll
        for (unsigned distance = 1; distance < kWarp; distance *= 2) {
            const Map<T> below = from_lane_below(mine, distance);
            if (lane_of_warp() >= static_cast<int>(distance)) mine = composed(mine, below);
        }
        if (lane_of_warp() == kWarp - 1) shared.warps[turn][warp_of_block()] = mine;
        const Map<T> before = from_lane_below(mine, 1);
        __syncthreads();
        State<T> state = carry;
        for (int w = 0; w < kWarps; ++w) {
            if (w == warp_of_block()) state = carry;
            carry = applied(shared.warps[turn][w], carry);
        }
        if (lane_of_warp() > 0) state = applied(before, state);
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
            const std::int64_t i = first - k;
            if (i < start) break;
            if (!keep[k]) {
                rows.write_masked(i);
                continue;
            }
            const State<T> after = applied(maps[k], state);
            rows.write(i, maps[k], state, after);
            state = after;
        }
    }
}

template <typename T, typename Rows>
int launch_scan(const Time<T>& time, const Rows& rows, void* stream) {
    if (time.count == 0) return static_cast<int>(cudaSuccess);
    RLCORE_LAUNCH((scan_kernel<T, Rows>), time.count, kThreads, stream, time, rows);
    return static_cast<int>(cudaGetLastError());
}

struct AdvantageShared {
    double reward[kThreads];
    double weight[kThreads];  // 0 where masked
    std::int64_t group[kThreads];
};

// Calls use(reward, weight, whether it is in the caller's group) for all rewards in their order.
template <typename Use>
RLCORE_DEVICE void each_reward(const Advantage& job, std::int64_t own_group, AdvantageShared& shared, Use use) {
    for (std::int64_t start = 0; start < job.n; start += kThreads) {
        const int t = thread_of_block();
        const std::int64_t i = start + t;
        const bool keep = i < job.n && (job.mask == nullptr || job.mask[i] != 0);
        __syncthreads();  // the last tile has been used
        shared.reward[t] = keep ? job.reward[i] : 0.0;
        shared.weight[t] = !keep ? 0.0 : job.weight == nullptr ? 1.0 : job.weight[i];
        shared.group[t] = job.group == nullptr || i >= job.n ? 0 : job.group[i];
        __syncthreads();
        const int tile = job.n - start < kThreads ? static_cast<int>(job.n - start) : kThreads;
        for (int j = 0; j < tile; ++j) use(shared.reward[j], shared.weight[j], shared.group[j] == own_group);
    }
}

struct Moments {
    double total, mean;
};

// reward - b of a reward, given the statistics of its group and of the batch.
RLCORE_DEVICE double residual_of(Center center, double reward, double weight, const Moments& group,
                                 const Moments& batch) {
    if (center == Center::none) return reward;
    // By value: a reference to one of the two would put both into memory.
    const Moments scope = {center == Center::batch ? batch.total : group.total,
                           center == Center::batch ? batch.mean : group.mean};
    const double others = scope.total - (center == Center::leave_one_out ? weight : 0.0);
    // The mean of the others is as far from the reward as the mean of all, times total / others.
    return others <= 0.0 ? 0.0 : (reward - scope.mean) * (scope.total / others);
}

__global__ void __launch_bounds__(kThreads) advantage_kernel(Advantage job) {
    RLCORE_SHARED(AdvantageShared, shared);
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kThreads + thread_of_block();
    const bool keep = row < job.n && (job.mask == nullptr || job.mask[row] != 0);
    const double reward = keep ? job.reward[row] : 0.0;
    const double weight = !keep ? 0.0 : job.weight == nullptr ? 1.0 : job.weight[row];
    const std::int64_t own = job.group == nullptr || row >= job.n ? 0 : job.group[row];

    Moments group = {0.0, 0.0};
    Moments batch = {0.0, 0.0};
    each_reward(job, own, shared, [&](double r, double w, bool same) {
        batch.total += w;
        batch.mean += w * r;
        group.total += same ? w : 0.0;
        group.mean += same ? w * r : 0.0;
    });
    group.mean /= group.total <= 0.0 ? 1.0 : group.total;
    batch.mean /= batch.total <= 0.0 ? 1.0 : batch.total;
    double result = residual_of(job.center, reward, weight, group, batch);

    if (job.scale != Scale::none) {
        const bool by_group = job.scale == Scale::group;
        const double total = by_group ? group.total : batch.total;
        double mean = by_group ? group.mean : batch.mean;
        const auto x = [&](double r, double w) {
            return job.spread_of_residual ? residual_of(job.center, r, w, group, batch) : r;
        };
        if (job.spread_of_residual) {
            double sum = 0.0;
            each_reward(job, own, shared, [&](double r, double w, bool same) {
                if (same || !by_group) sum += w * x(r, w);
            });
            mean = sum / (total <= 0.0 ? 1.0 : total);
        }
        double squares = 0.0;
        each_reward(job, own, shared, [&](double r, double w, bool same) {
            const double away = x(r, w) - mean;
            if (same || !by_group) squares += w * (away * away);
        });
        // 1 where it is not defined, so that dividing by it changes nothing.
        const double free = total - job.ddof;
        result /= (free <= 0.0 ? 1.0 : sqrt(squares / free)) + job.eps;
    }
    if (row < job.n) job.out[row] = keep ? result : 0.0;
}

}  // namespace

template <typename T>
int reverse_scan(const Time<T>& time, const T* delta, const PerRow<T>& decay, T* y, void* stream) {
    return launch_scan(time, ScanRows<T>{delta, decay, y}, stream);
}

template <typename T>
int gae(const Time<T>& time, const T* reward, const T* value, const PerRow<T>& gamma, const PerRow<T>& lam,
        T* advantage, T* returns, void* stream) {
    return launch_scan(time, GaeRows<T>{reward, value, gamma, lam, advantage, returns}, stream);
}

template <typename T>
int vtrace(const Time<T>& time, const T* reward, const T* value, const T* log_ratio, const PerRow<T>& gamma,
           const PerRow<T>& lam, T rho_bar, T c_bar, T* advantage, T* returns, void* stream) {
    const VtraceRows<T> rows = {reward, value, log_ratio, gamma, lam, rho_bar, c_bar, advantage, returns};
    return launch_scan(time, rows, stream);
}

int group_advantage(const Advantage& job, void* stream) {
    const std::int64_t blocks = (job.n + kThreads - 1) / kThreads;
    if (blocks == 0) return static_cast<int>(cudaSuccess);
    RLCORE_LAUNCH(advantage_kernel, blocks, kThreads, stream, job);
    return static_cast<int>(cudaGetLastError());
}

#define RLCORE_SCANS(T)                                                                                                \
    template int reverse_scan<T>(const Time<T>&, const T*, const PerRow<T>&, T*, void*);                               \
    template int gae<T>(const Time<T>&, const T*, const T*, const PerRow<T>&, const PerRow<T>&, T*, T*, void*);        \
    template int vtrace<T>(const Time<T>&, const T*, const T*, const T*, const PerRow<T>&, const PerRow<T>&, T, T, T*, \
                           T*, void*);
RLCORE_SCANS(float)
RLCORE_SCANS(double)

}  // namespace rlcore::cuda
