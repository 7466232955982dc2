// Loss, gradients and metrics of a flat batch. policy_row.h has the maths of a row; what is special here:
//     tokens_u = unmasked rows of unit u                  mean_u = sum over u of (logp - old_logp) / tokens_u
//     through_u = sum over u of d loss / d mean_u by row i / tokens_u          share_u = 1 / (tokens_u * sequences)
//
// rows_kernel: each thread adds the terms of its rows in registers and writes their gradients. A block's sums, over its
// warps by halving exchanges (lane l ends with sum number l) and then in the order of the warps, are a row of 32
// numbers of scratch. The block that is the last to have written its row adds all of them, in double and in the order
// of the blocks, and writes loss and metrics. Which block that is depends on the machine; what it computes does not.
// units_kernel, before it, where rows share something: a block walks a unit up to three times.
//
// Memory traffic: every field once (4 bytes a row, masks 1) but for masked rows, each gradient once, 128 bytes per
// block: 21 to 37 bytes a row. units_kernel adds logp, old_logp, the fields of the policy term where a gradient is
// wanted (from the second level cache, if a unit fits), and 4 to 12 bytes a row that are written and read.
//
// Launch: blocks of 256 threads, neighbours side by side since a field begins anywhere. A thread takes 1 row of a small
// batch and up to 32 of a large one, so that 2^20 rows are 512 blocks: three or four for each processor of a
// large GPU, and few enough for one block to add.
#include "cuda/policy_loss.h"

#include <atomic>
#include <cmath>

#include "cuda/device.h"
#include "cuda/policy_row.h"

namespace rlcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr std::int64_t kBlocks = 512;   // wanted
constexpr std::int64_t kMostEach = 32;  // rows of a thread, whose sums are float
constexpr int kUnitThreads = 128;       // responses have hundreds to thousands of tokens, segments fewer
constexpr int kUnitWarps = kUnitThreads / kWarp;
constexpr std::int64_t kUnitBlocks =
    4096;  // several for each processor; where there are more units, each takes several
static_assert(kMetrics <= kWarp, "a lane for each metric");

// Blocks of a launch that have written their sums. Zero between launches: the last block puts it back. Launches take
// turns with these; as many can not be under way.
constexpr unsigned kTurns = 1 << 14;
__device__ unsigned turns[kTurns];

// ---- one row

// Sums over a thread's rows, by metric; of those of which the largest counts, and ratio_min negated, that.
struct Running {
    float x[kWarp];
};

RLCORE_DEVICE bool is_extreme(int k) { return k == kRatioMin || k == kRatioMax || k == kDifferenceMax; }

RLCORE_DEVICE Running nothing() {
    Running run = {};
    run.x[kRatioMin] = run.x[kRatioMax] = -INFINITY;
    return run;
}

RLCORE_DEVICE void tally(float& count, bool which) { count += which ? 1.0f : 0.0f; }

RLCORE_DEVICE void add_ratio(const PolicyRule& rule, float ratio, float advantage, float floor, float ceiling,
                             Running& run) {
    if (rule.surrogate != Surrogate::reinforce) {
        const bool both = rule.surrogate == Surrogate::cispo;
        const bool below = ratio < floor && (both || advantage < 0.0f);
        const bool above = ratio > ceiling && (both || advantage > 0.0f);
        tally(run.x[kClipLow], below);
        tally(run.x[kClipHigh], above);
        tally(run.x[kClip], below || above);
    }
    if (rule.has_dual_clip) tally(run.x[kDualClip], advantage < 0.0f && ratio > rule.dual_clip);
    tally(run.x[kZeroAdvantage], advantage == 0.0f);
    run.x[kTokens] += 1.0f;
    run.x[kAdvantage] += advantage;
    run.x[kRatioMean] += ratio;
    run.x[kRatioMin] = greater(run.x[kRatioMin], -ratio);
    run.x[kRatioMax] = greater(run.x[kRatioMax], ratio);
}

// What an unmasked row holds. All of its loads come before the first use of any.
struct Row {
    float logp, entropy, advantage, old_logp, ref_logp, rollout_logp, weight, clip_low, clip_high;
    float coefficient, mean, through;
    bool in_kl;
};

RLCORE_DEVICE Row row_at(const PolicyJob& job, std::int64_t i, float uniform) {
    const PolicyFields& in = job.in;
    Row row;
    row.logp = in.logp[i];
    row.entropy = at_or(in.entropy, i, 0.0f);
    row.advantage = in.advantage[i];
    row.old_logp = at_or(in.old_logp, i, 0.0f);
    row.ref_logp = at_or(in.ref_logp, i, 0.0f);
    row.rollout_logp = at_or(in.rollout_logp, i, 0.0f);
    row.weight = at_or(in.weight, i, 1.0f);
    row.clip_low = at_or(in.clip_low, i, job.rule.clip_low);
    row.clip_high = at_or(in.clip_high, i, job.rule.clip_high);
    row.coefficient = at_or(in.coefficient, i, uniform);
    row.mean = at_or(job.shared.mean, i, 0.0f);
    row.through = at_or(job.shared.through, i, 0.0f);
    row.in_kl = in.ref_logp != nullptr && (in.kl_mask == nullptr || in.kl_mask[i] != 0);
    if (in.old_logp == nullptr) row.old_logp = row.logp;
    return row;
}

// The row's part of all sums, and its gradients.
RLCORE_DEVICE void add_row(const PolicyJob& job, std::int64_t i, const Row& row, Running& run) {
    const PolicyRule& rule = job.rule;
    const bool by_unit = rule.ratio == Ratio::unit;
    const float own = row.logp - (rule.ratio == Ratio::none ? row.logp : row.old_logp);
    const float far = by_unit ? row.mean : own;
    const float log_ratio = bounded(far);
    const Exponentials e = exponentials(log_ratio);
    run.x[kOldK1] -= log_ratio;
    run.x[kOldK3] += e.rest;
    const float floor = 1.0f - row.clip_low;
    const float ceiling = 1.0f + row.clip_high;
    add_ratio(rule, e.exp, row.advantage, floor, ceiling, run);

    const Term term = surrogate_term(rule, row.logp, e.exp, row.advantage, floor, ceiling);
    float factor = row.weight;
    if (job.in.rollout_logp != nullptr) {
        const float difference = row.old_logp - row.rollout_logp;
        const Behaviour b = behaviour_of(rule, difference);
        if (rule.has_correction) factor *= b.weight;
        run.x[kRolloutK1] -= difference;
        run.x[kRolloutK3] += b.rest;
        run.x[kDifferenceMax] = greater(run.x[kDifferenceMax], fabsf(difference));
        run.x[kWeight] += b.weight;
        run.x[kWeightSquared] += b.weight * b.weight;
        tally(run.x[kCorrected], b.over);
    }
    run.x[kPolicyTerm] += row.coefficient * (term.loss * factor);
    factor *= row.coefficient;
    float d_logp = factor * term.by_logp;
    if (by_unit) {
        d_logp += row.through;
    } else if (is_near(far)) {
        d_logp += factor * term.by_log_ratio;
    }

    // Rows outside the KL mask have no divergence, whatever the reference holds there.
    if (row.in_kl) {
        const Divergence d = divergence(rule.estimator, row.logp - row.ref_logp);
        run.x[kRefK1] += d.k1;
        run.x[kRefK3] += d.k3;
        if (rule.estimator != Estimator::none) {
            run.x[kKlTerm] += rule.kl * row.coefficient * d.value;
            d_logp += rule.kl * row.coefficient * d.slope;
        }
    }
    run.x[kLogp] += row.logp;
    run.x[kEntropy] += row.entropy;
    const float d_entropy = -rule.entropy * row.coefficient;
    if (rule.has_entropy_term) run.x[kEntropyTerm] += d_entropy * row.entropy;
    if (job.d_logp != nullptr) job.d_logp[i] = d_logp;
    if (job.d_entropy != nullptr) job.d_entropy[i] = d_entropy;
}

// ---- sums over a block, then over all

// Lane l gets the sum of x[l] over the warp: lanes exchange halves, 31 times in all.
RLCORE_DEVICE float exchanged_sum(float (&x)[kWarp]) {
    int held = kWarp;
#pragma unroll
    for (int step = 0; step < 5; ++step) {
        held /= 2;
        const bool upper = (lane_of_warp() & held) != 0;
#pragma unroll
        for (int k = 0; k < kWarp / 2; ++k) {
            if (k >= held) break;
            const float given = upper ? x[k] : x[k + held];
            const float kept = upper ? x[k + held] : x[k];
            x[k] = kept + __shfl_xor_sync(kAllLanes, given, held);
        }
    }
    return x[0];
}

RLCORE_DEVICE float warp_greatest(float x) {
    for (int step = kWarp / 2; step > 0; step /= 2) x = greater(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
}

template <typename T>
RLCORE_DEVICE T combined(int k, T a, T b) {
    return is_extreme(k) ? greater(a, b) : a + b;
}

struct RowsShared {
    float warps[kWarps][kWarp];
    double all[kWarps][kWarp];
    bool is_last;
};

RLCORE_DEVICE void store_sums(Running& run, RowsShared& shared, float* scratch) {
    const int k = lane_of_warp();
    const float low = warp_greatest(run.x[kRatioMin]);
    const float high = warp_greatest(run.x[kRatioMax]);
    const float most = warp_greatest(run.x[kDifferenceMax]);
    const float sum = exchanged_sum(run.x);
    shared.warps[warp_of_block()][k] = k == kRatioMin ? low : k == kRatioMax ? high : k == kDifferenceMax ? most : sum;
    __syncthreads();
    if (warp_of_block() != 0) return;
    float value = shared.warps[0][k];
    for (int w = 1; w < kWarps; ++w) value = combined(k, value, shared.warps[w][k]);
    scratch[static_cast<std::int64_t>(blockIdx.x) * kWarp + k] = value;
}

// Whether all other blocks have stored their sums, which can then be read.
RLCORE_DEVICE bool is_last_block(unsigned* turn, RowsShared& shared) {
    __threadfence();
    __syncthreads();
    if (thread_of_block() == 0) shared.is_last = atomicAdd(turn, 1u) == gridDim.x - 1;
    __syncthreads();
    __threadfence();
    return shared.is_last;
}

RLCORE_DEVICE bool is_mean(int k) {
    return !is_extreme(k) && k != kTokens && k != kPolicyTerm && k != kKlTerm && k != kEntropyTerm && k != kWeight &&
           k != kWeightSquared;
}

RLCORE_DEVICE void write_metrics(const PolicyJob& job, RowsShared& shared) {
    const int k = lane_of_warp();
    double value = shared.all[0][k];
    for (int w = 1; w < kWarps; ++w) value = combined(k, value, shared.all[w][k]);
    if (k == kRatioMin) value = -value;
    if (is_mean(k)) value /= static_cast<double>(at_least_one(*job.tokens));
    const auto of = [value](int metric) { return __shfl_sync(kAllLanes, value, metric); };
    const double loss = of(kPolicyTerm) + of(kKlTerm) + of(kEntropyTerm);
    const double squares = of(kTokens) * of(kWeightSquared);
    const double weight = of(kWeight);
    if (k == kEss) value = squares > 0.0 ? weight * weight / squares : 1.0;
    if (k == kLoss) {
        value = loss;
        *job.loss = static_cast<float>(loss);
    }
    const unsigned before = job.chosen & ((1u << k) - 1u);
    if ((job.chosen >> k & 1u) != 0) job.metrics[__popc(before)] = static_cast<float>(value);
}

// In the last block: a warp adds the rows of scratch w, w + 8, ..., a lane for each metric.
RLCORE_DEVICE void finish(const PolicyJob& job, RowsShared& shared) {
    const int k = lane_of_warp();
    double sum = 0.0;
    float most = k == kDifferenceMax ? 0.0f : -INFINITY;
#pragma unroll 16
    for (unsigned b = static_cast<unsigned>(warp_of_block()); b < gridDim.x; b += kWarps) {
        const float x = __ldcg(job.scratch + static_cast<std::int64_t>(b) * kWarp + k);
        sum += static_cast<double>(x);
        most = greater(most, x);
    }
    shared.all[warp_of_block()][k] = is_extreme(k) ? static_cast<double>(most) : sum;
    __syncthreads();
    if (warp_of_block() == 0) write_metrics(job, shared);
}

// `own_turn` is a zero of this launch alone, null for one of `turns`.
__global__ void __launch_bounds__(kThreads)
    rows_kernel(PolicyJob job, std::int64_t each, unsigned* own_turn, unsigned turn) {
    RLCORE_SHARED(RowsShared, shared);
    const float uniform = job.in.coefficient == nullptr ? uniform_coefficient(job) : 0.0f;
    const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * each * kThreads;
    const std::int64_t stop = start + each * kThreads < job.n ? start + each * kThreads : job.n;
    Running run = nothing();
    std::int64_t i = start + thread_of_block();
    bool keep = i < stop && counts(job.in, i);
    for (; i < stop; i += kThreads) {
        const Row row = keep ? row_at(job, i, uniform) : Row{};
        // The next row's mask is on its way while this row's fields are.
        const bool next = i + kThreads < stop && counts(job.in, i + kThreads);
        if (keep) {
            add_row(job, i, row, run);
        } else {
            if (job.d_logp != nullptr) job.d_logp[i] = 0.0f;
            if (job.d_entropy != nullptr) job.d_entropy[i] = 0.0f;
        }
        keep = next;
    }
    store_sums(run, shared, job.scratch);
    unsigned* counter = own_turn == nullptr ? &turns[turn] : own_turn;
    if (!is_last_block(counter, shared)) return;
    if (thread_of_block() == 0) *counter = 0;
    finish(job, shared);
}

// ---- units

struct UnitsShared {
    float tokens[2][kUnitWarps];
    float difference[2][kUnitWarps];
    float through[2][kUnitWarps];
};

// The derivative of the loss by the mean log-ratio of the row's unit, through this row.
RLCORE_DEVICE float slope_of(const PolicyJob& job, std::int64_t i, float ratio, float coefficient) {
    const PolicyFields& in = job.in;
    const float advantage = in.advantage[i];
    const float low = at_or(in.clip_low, i, job.rule.clip_low);
    const float high = at_or(in.clip_high, i, job.rule.clip_high);
    const float* old = in.old_logp == nullptr ? in.logp : in.old_logp;
    const float difference = job.rule.has_correction ? old[i] - in.rollout_logp[i] : 0.0f;
    float factor = coefficient * at_or(in.weight, i, 1.0f);
    if (job.rule.has_correction) factor *= behaviour_of(job.rule, difference).weight;
    // The term's own logp matters to none of the surrogates whose ratio has a gradient.
    return factor * surrogate_term(job.rule, 0.0f, ratio, advantage, 1.0f - low, 1.0f + high).by_log_ratio;
}

__global__ void __launch_bounds__(kUnitThreads) units_kernel(PolicyJob job) {
    RLCORE_SHARED(UnitsShared, shared);
    const PolicyFields& in = job.in;
    const Units& units = job.units;
    const std::int64_t count = units.known == nullptr ? units.count : *units.known;
    const bool differs = job.shared.mean != nullptr && in.old_logp != nullptr;
    const float given = job.shared.share == nullptr && in.coefficient == nullptr ? uniform_coefficient(job) : 0.0f;
    int turn = 0;  // sums of a unit are read while those of the next are written
    for (std::int64_t u = blockIdx.x; u < count; u += gridDim.x, turn = 1 - turn) {
        const std::int64_t start = units.borders[u] + thread_of_block();
        const std::int64_t stop = units.borders[u + 1];
        const auto row_at = [&](std::int64_t place) { return units.order == nullptr ? place : units.order[place]; };
        int found = 0;
        float difference = 0.0f;
        for (std::int64_t place = start; place < stop; place += kUnitThreads) {
            const std::int64_t i = row_at(place);
            if (!counts(in, i)) continue;
            ++found;
            if (differs) difference += in.logp[i] - in.old_logp[i];
        }
        const float tokens = at_least_one(block_sum(static_cast<float>(found), shared.tokens[turn]));
        const float mean = differs ? block_sum(difference, shared.difference[turn]) / tokens : 0.0f;
        const float share = 1.0f / (tokens * at_least_one(*job.sequences));
        float through = 0.0f;
        if (job.shared.through != nullptr) {
            const float ratio = exponentials(bounded(mean)).exp;
            const float own = job.shared.share == nullptr ? given : share;
            for (std::int64_t place = start; place < stop; place += kUnitThreads) {
                const std::int64_t i = row_at(place);
                if (counts(in, i)) through += slope_of(job, i, ratio, at_or(in.coefficient, i, own));
            }
            through = block_sum(through, shared.through[turn]) / tokens;
            if (!is_near(mean)) through = 0.0f;  // a bounded mean moves nothing
        }
        for (std::int64_t place = start; place < stop; place += kUnitThreads) {
            const std::int64_t i = row_at(place);
            if (job.shared.mean != nullptr) job.shared.mean[i] = mean;
            if (job.shared.through != nullptr) job.shared.through[i] = through;
            if (job.shared.share != nullptr) job.shared.share[i] = share;
        }
    }
}

// ---- launches

std::int64_t rows_of_thread(std::int64_t n) {
    const std::int64_t each = (n + kThreads * kBlocks - 1) / (kThreads * kBlocks);
    return each < 1 ? 1 : each > kMostEach ? kMostEach : each;
}

std::int64_t blocks_of(std::int64_t n) {
    const std::int64_t rows = kThreads * rows_of_thread(n);
    return n <= rows ? 1 : (n + rows - 1) / rows;
}

}  // namespace

// The last number is a launch's own turn.
std::int64_t policy_loss_scratch(std::int64_t n) { return blocks_of(n) * kWarp + 1; }

int policy_units(const PolicyJob& job, void* stream) {
    const std::int64_t blocks = job.units.count < kUnitBlocks ? job.units.count : kUnitBlocks;
    if (blocks == 0) return static_cast<int>(cudaSuccess);
    RLCORE_LAUNCH(units_kernel, blocks, kUnitThreads, stream, job);
    return static_cast<int>(cudaGetLastError());
}

int policy_loss(const PolicyJob& job, void* stream) {
    static std::atomic<unsigned> launches{0};
    // A graph runs again and again, whatever other launches have the turn it was captured with: it brings its own.
    unsigned* own = nullptr;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
    if (error != cudaSuccess) return static_cast<int>(error);
    if (status != cudaStreamCaptureStatusNone) {
        own = reinterpret_cast<unsigned*>(job.scratch + policy_loss_scratch(job.n) - 1);
        error = cudaMemsetAsync(own, 0, sizeof(unsigned), static_cast<cudaStream_t>(stream));
        if (error != cudaSuccess) return static_cast<int>(error);
    }
    RLCORE_LAUNCH(rows_kernel, blocks_of(job.n), kThreads, stream, job, rows_of_thread(job.n), own,
                  launches.fetch_add(1, std::memory_order_relaxed) % kTurns);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace rlcore::cuda
