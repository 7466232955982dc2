// The clipped-surrogate family on the GPU: loss, gradients and metrics of a flat float32 batch in one launch, two where
// rows of a sequence or a segment share something. The counterpart of cpu/policy_loss.h.
#pragma once

#include <cstdint>

namespace rlcore::cuda {

enum class Ratio { none, token, unit };
enum class Surrogate { ppo, cispo, reinforce };
enum class Estimator { none, k1, k2, k3 };
enum class Aggregate { token_mean, sequence_mean, sequence_sum, sequence_sum_norm };

struct PolicyRule {
    Ratio ratio;
    Surrogate surrogate;
    Estimator estimator;
    Aggregate aggregate;
    bool has_dual_clip;
    bool has_correction;
    bool has_entropy_term;
    float clip_low;
    float clip_high;
    float dual_clip;
    float cap;
    float kl;
    float entropy;
    float length;
};

// [N] each on the device with unit stride; null where the batch has none. What masked rows hold is never read.
struct PolicyFields {
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
    const float* coefficient;  // of each row in the loss; null: one number for all
};

// Rows that share something: unit u owns places borders[u] to borders[u + 1].
struct Units {
    const std::int64_t* borders;
    const std::int64_t* order;  // [N] the row at each place; null: rows as they lie
    const std::int64_t* known;  // [1] how many of the units there are; null: all
    std::int64_t count;
};

// What the rows of a unit share, left on each of its rows, [N]; null where it is not wanted.
struct UnitTerms {
    float* mean;     // Ratio::unit: the mean log-ratio, not yet bounded
    float* through;  // Ratio::unit: the mean derivative of the loss by that
    float* share;    // Aggregate::sequence_mean: 1 / (unmasked tokens of the unit * sequences)
};

struct PolicyJob {
    PolicyFields in;
    PolicyRule rule;
    std::int64_t n;
    const float* tokens;     // [1] of the minibatch, on the device
    const float* sequences;  // [1] likewise
    Units units;
    UnitTerms shared;
    float* d_logp;     // [N]; null: not asked for
    float* d_entropy;  // [N]; null: not asked for
    float* scratch;    // policy_loss_scratch(n) numbers
    float* loss;       // [1]
    float* metrics;    // one for each bit of `chosen`
    unsigned chosen;   // which of the metrics below are written, in their order
};

// In the order of rlcore.algorithms.policy_loss_metrics.METRICS.
enum Metric {
    kTokens,
    kRatioMean,
    kRatioMin,
    kRatioMax,
    kClipLow,
    kClipHigh,
    kClip,
    kOldK1,
    kOldK3,
    kZeroAdvantage,
    kAdvantage,
    kDualClip,
    kPolicyTerm,
    kKlTerm,
    kEntropyTerm,
    kLogp,
    kEntropy,
    kRefK1,
    kRefK3,
    kRolloutK1,
    kRolloutK3,
    kDifferenceMax,
    kWeight,
    kWeightSquared,
    kEss,
    kCorrected,
    kLoss,
    kMetrics
};

std::int64_t policy_loss_scratch(std::int64_t n);

// Each returns a cudaError_t. What units share goes to job.shared.
int policy_units(const PolicyJob& job, void* stream);

// The loss, its metrics and gradients, given what units share; job.units is not read, nor is job.shared.share, which is
// the coefficient here.
int policy_loss(const PolicyJob& job, void* stream);

}  // namespace rlcore::cuda
