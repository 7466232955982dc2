// The clipped-surrogate family in float32: loss, gradients and metrics of a flat batch in one pass over its rows, or,
// where a sequence or a segment shares its ratio, in that pass between two light ones.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace rlcore::cpu {

enum class Ratio { none, token, unit };
enum class Surrogate { ppo, cispo, reinforce };
enum class Estimator { none, k1, k2, k3 };

struct PolicyRule {
    Ratio ratio;
    Surrogate surrogate;
    Estimator kl;
    bool has_dual_clip;
    bool has_correction;
    bool has_entropy_term;
    float clip_low;
    float clip_high;
    float dual_clip;
    float cap;
    float kl_coefficient;
    float entropy_coefficient;
};

// [N] each with unit stride; null where the batch has none. What masked rows hold is never used.
struct PolicyRows {
    const float* logp;
    const float* entropy;
    const float* advantage;
    const float* old_logp;
    const float* ref_logp;
    const float* rollout_logp;
    const float* weight;
    const float* clip_low;
    const float* clip_high;
    const std::uint8_t* mask;
    const std::uint8_t* kl_mask;
    const float* coefficient;  // of each row in the loss; null: `uniform` for all
    float uniform;
    const float* unit_mean;  // Ratio::unit: the mean log-ratio of the row's unit, not yet bounded
    float* d_logp;           // d loss / d logp; null: not asked for
    float* d_entropy;        // d loss / d entropy; null: not asked for
    float* through;          // Ratio::unit: d loss / d (unit's mean log-ratio) by this row's loss
};

// Sums over rows; masked rows count nowhere. Means are made of them by the tokens of the minibatch.
struct PolicySums {
    double policy, kl, entropy_term;  // loss terms, with their coefficients
    double ratio, log_ratio, old_k3, advantage, logp, entropy, ref_k1, ref_k3;
    double rollout_difference, rollout_k3, weight, weight_squared;
    std::int64_t tokens, below, above, clipped, zero_advantage, dual_clipped, corrected;
    float ratio_min, ratio_max, difference_max;
};

// Rows summed by one thread in one fixed order; partial results are added in the order of the blocks.
constexpr std::int64_t kPolicyBlock = 8192;

// Which unit shares a ratio: sequences by `offsets` [count + 1], or ids [N] from `base` to base + count - 1.
struct Units {
    const std::int64_t* offsets;
    const std::int64_t* ids;
    std::int64_t base;
    std::int64_t count;
};

struct Totals {
    float tokens;     // of the minibatch, at least 1
    float sequences;  // of the minibatch, at least 1
};

// The most metrics that `policy_loss` writes.
constexpr int kMostMetrics = 32;

// The whole: loss (1 number), gradients and metrics, in the order of
// rlcore.algorithms.policy_loss_metrics.metric_names. `sequence_mean` gives each row the coefficient 1 / (unmasked
// tokens of its sequence * sequences), by `offsets`. Returns the number of metrics. The result does not depend on the
// number of threads.
int policy_loss(PolicyRows rows, const PolicyRule& rule, std::int64_t n, const Units& units,
                const std::int64_t* sequence_mean, std::int64_t sequences, const Totals& totals, int threads,
                float* loss, float* metrics);

}  // namespace rlcore::cpu

// The one pass: sums[b] over the rows of block b, and gradients.
RLCORE_KERNEL(void policy_rows(const PolicyRows& rows, const PolicyRule& rule, std::int64_t n, PolicySums* sums,
                               int threads))
