// The terms of one row of the policy loss with their derivatives, in float32: what the kernels of policy_loss.cu share.
// rlcore.algorithms.policy_loss_terms states the maths.
#pragma once

#include <cmath>

#include "cuda/device.h"
#include "cuda/policy_loss.h"

namespace rlcore::cuda {
namespace {

// exp(20) = 4.9e8: far outside every clip range, and far from the overflow that would turn 0 * inf into NaN gradients.
constexpr float kBound = 20.0f;

// min(max(x, low), high) with torch's rules: NaN in any argument is the result, `high` wins over `low`.
RLCORE_DEVICE float clamped(float x, float low, float high) {
    x = x < low || low != low ? low : x;
    return x > high || high != high ? high : x;
}

RLCORE_DEVICE float bounded(float x) { return clamped(x, -kBound, kBound); }
RLCORE_DEVICE bool is_near(float x) { return fabsf(x) <= kBound; }

// A NaN, once met, stays.
template <typename T>
RLCORE_DEVICE T greater(T a, T b) {
    return b > a || b != b ? b : a;
}

RLCORE_DEVICE float at_least_one(float x) { return x > 1.0f ? x : 1.0f; }

struct Exponentials {
    float exp;    // e^x
    float minus;  // e^x - 1
    float rest;   // e^x - 1 - x
};

// All three keep their digits near 0. e^x = 2^n e^r with |r| <= ln(2) / 2, and e^r = 1 + r + r^2 (1/2 + r/6 + ...);
// adding 1.5 * 2^23 rounds to the next integer and leaves it in the last bits. For |x| <= 20, relative error below
// 2^-21.
RLCORE_DEVICE Exponentials exponentials(float x) {
    const float magic = 12582912.0f;
    const float shifted = x * 1.44269504088896341f + magic;
    const float n = shifted - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = r * (1.0f / 40320) + (1.0f / 5040);
    p = p * r + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    const float square = p * r * r;
    // 0x4b400000 is `magic`; the integer may be negative, so the shift is of an unsigned number.
    const float scale = __uint_as_float((__float_as_uint(shifted) - (0x4b400000u - 127u)) << 23);
    const float minus = scale * (r + square) + (scale - 1.0f);
    return {scale * (r + square) + scale, minus, n == 0.0f ? square : minus - x};
}

// The policy term of a row, and its derivatives by the log-ratio (through the ratio) and by logp itself.
struct Term {
    float loss;
    float by_log_ratio;
    float by_logp;
};

// Where the two sides of a maximum are equal each takes half the gradient, as in torch. Products that are compared are
// rounded, never fused.
RLCORE_DEVICE Term surrogate_term(const PolicyRule& rule, float logp, float ratio, float advantage, float floor,
                                  float ceiling) {
    if (rule.surrogate == Surrogate::reinforce) {
        if (rule.ratio == Ratio::none) return {-advantage * logp, 0.0f, -advantage};
        const float loss = -advantage * ratio;
        return {loss, loss, 0.0f};
    }
    const float clipped = clamped(ratio, floor, ceiling);
    const float bound = __fmul_rn(-clipped, advantage);
    if (rule.surrogate == Surrogate::cispo) return {bound * logp, 0.0f, bound};
    const float free = __fmul_rn(-ratio, advantage);
    float loss = free < bound || bound != bound ? bound : free;
    const float tie = free == bound ? 0.5f : 1.0f;
    float share = free < bound ? 0.0f : tie;
    share += ratio >= floor && ratio <= ceiling && !(free > bound) ? tie : 0.0f;
    if (rule.has_dual_clip && advantage < 0.0f) {
        const float most = __fmul_rn(-rule.dual_clip, advantage);
        share *= loss == most ? 0.5f : loss > most ? 0.0f : 1.0f;
        loss = loss > most ? most : loss;
    }
    return {loss, -advantage * share * ratio, 0.0f};
}

// exp(old_logp - rollout_logp), cut at the cap where it corrects.
struct Behaviour {
    float weight;
    bool over;   // the cap
    float rest;  // e^x - 1 - x
};

RLCORE_DEVICE Behaviour behaviour_of(const PolicyRule& rule, float difference) {
    const Exponentials e = exponentials(bounded(difference));
    const bool over = e.exp > rule.cap;
    return {rule.has_correction && over ? rule.cap : e.exp, over, e.rest};
}

// Schulman's estimator of the KL from x = log pi - log ref, and its derivative; k1 and k3, whatever was asked for.
struct Divergence {
    float value, slope, k1, k3;
};

RLCORE_DEVICE Divergence divergence(Estimator estimator, float x) {
    const float y = bounded(x);
    const Exponentials e = exponentials(-y);
    const float value = estimator == Estimator::k1 ? y : estimator == Estimator::k2 ? y * y * 0.5f : e.rest;
    const float slope = estimator == Estimator::k1 ? 1.0f : estimator == Estimator::k2 ? y : -e.minus;
    return {value, is_near(x) ? slope : 0.0f, y, e.rest};
}

RLCORE_DEVICE bool counts(const PolicyFields& in, std::int64_t i) { return in.mask == nullptr || in.mask[i] != 0; }

RLCORE_DEVICE float at_or(const float* field, std::int64_t i, float number) {
    return field == nullptr ? number : field[i];
}

// What every row weighs in the loss, where that is one number.
RLCORE_DEVICE float uniform_coefficient(const PolicyJob& job) {
    if (job.rule.aggregate == Aggregate::token_mean) return 1.0f / at_least_one(*job.tokens);
    const float sequences = at_least_one(*job.sequences);
    return 1.0f / (job.rule.aggregate == Aggregate::sequence_sum_norm ? sequences * job.rule.length : sequences);
}

}  // namespace
}  // namespace rlcore::cuda
