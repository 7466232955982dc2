#include "cpu/policy_loss.h"

#include "cpu/simd.h"
#include "cpu/team.h"

namespace rlcore::cpu::RLCORE_ISA {
namespace {

// exp(20) = 4.9e8: far outside every clip range, and far from the overflow that would turn 0 * inf into NaN gradients.
constexpr float kLogRatioBound = 20.0f;

// Vectors whose float32 sums are taken before they are added in double: a lane adds 16 numbers.
constexpr std::int64_t kShort = 16;

typedef std::uint8_t Bytes __attribute__((vector_size(RLCORE_VECTOR_BYTES / 4)));

RLCORE_INLINE Floats masked(Floats x, Ints keep) { return reinterpret_cast<Floats>(reinterpret_cast<Ints>(x) & keep); }
RLCORE_INLINE Floats magnitude(Floats x) { return reinterpret_cast<Floats>(reinterpret_cast<Ints>(x) & 0x7fffffff); }

// min(max(x, low), high) with torch's rules: NaN in any argument is the result, `high` wins over `low`.
RLCORE_INLINE Floats clamped(Floats x, Floats low, Floats high) {
    x = select((x < low) | (low != low), low, x);
    return select((x > high) | (high != high), high, x);
}

struct Exponentials {
    Floats exp;    // e^x
    Floats minus;  // e^x - 1
    Floats rest;   // e^x - 1 - x
};

// All three keep their digits near 0, where e^x = 1 + r + r^2 (1/2 + r/6 + ...) with r = x: each leaves out what the
// next one does not want. For |x| <= 20, relative error below 2^-21.
RLCORE_INLINE Exponentials exponentials(Floats x) {
    const Floats magic = broadcast(12582912.0f);
    const Floats shifted = x * 1.44269504088896341f + magic;
    const Floats n = shifted - magic;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * (1.0f / 40320) + (1.0f / 5040);
    p = p * r + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    const Floats square = p * r * r;
    const Ints exponent = ((reinterpret_cast<Ints>(shifted) - reinterpret_cast<Ints>(magic)) + 127) << 23;
    const Floats scale = reinterpret_cast<Floats>(exponent);
    const Floats minus = r + square;
    Exponentials e;
    e.exp = scale * minus + scale;
    e.minus = scale * minus + (scale - 1.0f);
    e.rest = select(n == 0.0f, square, e.minus - x);
    return e;
}

// Fields of a row's partial results, in the order of PolicySums.
enum {
    kPolicy,
    kKl,
    kEntropyTerm,
    kRatio,
    kLogRatio,
    kOldK3,
    kAdvantage,
    kLogp,
    kEntropy,
    kRefK1,
    kRefK3,
    kDifference,
    kRolloutK3,
    kWeight,
    kWeightSquared,
    kSums
};
enum { kTokens, kBelow, kAbove, kClipped, kZeroAdvantage, kDualClipped, kCorrected, kCounts };

struct Running {
    Floats sums[kSums];
    Ints counts[kCounts];  // each true lane is -1
    Floats ratio_min, ratio_max, difference_max;
};

RLCORE_INLINE Ints bytes_at(const std::uint8_t* p, std::int64_t left) {
    Bytes b = {};
    if (left >= kLanes) {
        std::memcpy(&b, p, sizeof(b));
    } else {
        std::memcpy(&b, p, static_cast<std::size_t>(left));
    }
    return __builtin_convertvector(b, Ints) != 0;
}

template <bool kWhole>
RLCORE_INLINE Floats read(const float* p, std::int64_t left, Ints keep) {
    return masked(kWhole ? load(p) : load_part(p, left, 0.0f), keep);
}

template <bool kWhole>
RLCORE_INLINE void write(float* p, std::int64_t left, Floats x) {
    if (kWhole) {
        store(p, x);
    } else {
        store_part(p, x, left);
    }
}

// The policy term of a row, and its derivatives by the log-ratio (through the ratio) and by logp itself.
struct Term {
    Floats loss;
    Floats by_log_ratio;
    Floats by_logp;
};

// Where the two sides of a maximum are equal each takes half the gradient, as in torch.
RLCORE_INLINE Term surrogate_term(const PolicyRule& rule, Floats logp, Floats ratio, Floats advantage, Floats floor,
                                  Floats ceiling) {
    const Floats zero = {};
    const Floats half = broadcast(0.5f);
    const Floats one = broadcast(1.0f);
    if (rule.surrogate == Surrogate::reinforce) {
        if (rule.ratio == Ratio::none) return {-advantage * logp, zero, -advantage};
        const Floats loss = -advantage * ratio;
        return {loss, loss, zero};
    }
    const Floats clipped = clamped(ratio, floor, ceiling);
    if (rule.surrogate == Surrogate::cispo) {
        const Floats slope = -clipped * advantage;
        return {slope * logp, zero, slope};
    }
    const Floats free = rounded(-ratio * advantage);
    const Floats bound = rounded(-clipped * advantage);
    Floats loss = select((free < bound) | (bound != bound), bound, free);
    const Floats tie = select(free == bound, half, one);
    const Ints inside = (ratio >= floor) & (ratio <= ceiling);
    Floats share = select(free < bound, zero, tie);
    share += masked(select(free > bound, zero, tie), inside);
    if (rule.has_dual_clip) {
        const Floats most = rounded(-rule.dual_clip * advantage);
        const Ints negative = advantage < 0.0f;
        const Floats kept = select(loss == most, half, select(loss > most, zero, one));
        loss = select(negative & (loss > most), most, loss);
        share *= select(negative, kept, one);
    }
    return {loss, -advantage * share * ratio, zero};
}

template <bool kWhole>
RLCORE_INLINE void add_rows(const PolicyRows& rows, const PolicyRule& rule, std::int64_t i, std::int64_t left,
                            Running& run) {
    Ints keep = ~Ints{};
    if (!kWhole) {
        for (int lane = 0; lane < kLanes; ++lane) keep[lane] = lane < left ? -1 : 0;
    }
    if (rows.mask != nullptr) keep &= bytes_at(rows.mask + i, left);
    const Floats logp = read<kWhole>(rows.logp + i, left, keep);
    const Floats old_logp = rows.old_logp == nullptr ? logp : read<kWhole>(rows.old_logp + i, left, keep);
    const Floats advantage = read<kWhole>(rows.advantage + i, left, keep);
    const Floats coefficient = rows.coefficient == nullptr ? masked(broadcast(rows.uniform), keep)
                                                           : read<kWhole>(rows.coefficient + i, left, keep);

    const Floats bound = broadcast(kLogRatioBound);
    Floats log_ratio = logp - (rule.ratio == Ratio::none ? logp : old_logp);
    if (rule.ratio == Ratio::unit) log_ratio = read<kWhole>(rows.unit_mean + i, left, keep);
    const Ints moves = magnitude(log_ratio) <= bound;
    log_ratio = clamped(log_ratio, -bound, bound);
    const Exponentials e = exponentials(log_ratio);
    const Floats ratio = e.exp;
    const Floats low =
        rows.clip_low == nullptr ? broadcast(rule.clip_low) : read<kWhole>(rows.clip_low + i, left, keep);
    const Floats high =
        rows.clip_high == nullptr ? broadcast(rule.clip_high) : read<kWhole>(rows.clip_high + i, left, keep);
    const Floats floor = 1.0f - low;
    const Floats ceiling = 1.0f + high;

    Term term = surrogate_term(rule, logp, ratio, advantage, floor, ceiling);
    Floats factor = coefficient;
    if (rows.rollout_logp != nullptr) {
        const Floats difference = old_logp - read<kWhole>(rows.rollout_logp + i, left, keep);
        const Exponentials behaviour = exponentials(clamped(difference, -bound, bound));
        Floats weight = behaviour.exp;
        if (rule.has_correction) {
            const Ints over = weight > rule.cap;
            weight = select(over, broadcast(rule.cap), weight);
            run.counts[kCorrected] += over & keep;
            term.loss *= weight;
            factor *= weight;
        }
        weight = masked(weight, keep);
        const Floats far = magnitude(difference);
        run.sums[kDifference] += difference;
        run.sums[kRolloutK3] += behaviour.rest;
        run.sums[kWeight] += weight;
        run.sums[kWeightSquared] += weight * weight;
        run.difference_max = select((far > run.difference_max) | (far != far), far, run.difference_max);
    }
    if (rows.weight != nullptr) {
        const Floats weight = read<kWhole>(rows.weight + i, left, keep);
        term.loss *= weight;
        factor *= weight;
    }
    run.sums[kPolicy] += coefficient * term.loss;
    Floats d_logp = factor * term.by_logp;
    const Floats through = masked(factor * term.by_log_ratio, moves);
    if (rule.ratio == Ratio::unit) {
        if (rows.through != nullptr) write<kWhole>(rows.through + i, left, masked(through, keep));
    } else {
        d_logp += through;
    }

    if (rows.ref_logp != nullptr) {
        // Rows outside the KL mask have a difference of 0, whatever the reference holds there.
        Ints chosen = keep;
        if (rows.kl_mask != nullptr) chosen &= bytes_at(rows.kl_mask + i, left);
        const Floats x = masked(logp - read<kWhole>(rows.ref_logp + i, left, chosen), chosen);
        const Ints near = magnitude(x) <= bound;
        const Floats y = clamped(x, -bound, bound);
        const Exponentials back = exponentials(-y);
        run.sums[kRefK1] += y;
        run.sums[kRefK3] += back.rest;
        if (rule.kl != Estimator::none) {
            const Floats selected = masked(coefficient, chosen);
            const Floats value = rule.kl == Estimator::k1 ? y : rule.kl == Estimator::k2 ? y * y * 0.5f : back.rest;
            const Floats slope = rule.kl == Estimator::k1   ? broadcast(1.0f)
                                 : rule.kl == Estimator::k2 ? y
                                                            : -back.minus;
            run.sums[kKl] += selected * value;
            d_logp += rule.kl_coefficient * selected * masked(slope, near);
        }
    }
    if (rows.d_logp != nullptr) write<kWhole>(rows.d_logp + i, left, masked(d_logp, keep));
    if (rows.entropy != nullptr) {
        const Floats entropy = read<kWhole>(rows.entropy + i, left, keep);
        run.sums[kEntropy] += entropy;
        if (rule.has_entropy_term) run.sums[kEntropyTerm] += coefficient * entropy;
    }
    if (rows.d_entropy != nullptr) write<kWhole>(rows.d_entropy + i, left, -rule.entropy_coefficient * coefficient);

    Ints below = (ratio < floor) & keep;
    Ints above = (ratio > ceiling) & keep;
    if (rule.surrogate == Surrogate::ppo) {
        below &= advantage < 0.0f;
        above &= advantage > 0.0f;
    }
    if (rule.surrogate != Surrogate::reinforce) {
        run.counts[kBelow] += below;
        run.counts[kAbove] += above;
        run.counts[kClipped] += below | above;
    }
    if (rule.has_dual_clip) run.counts[kDualClipped] += (advantage < 0.0f) & (ratio > rule.dual_clip) & keep;
    run.counts[kTokens] += keep;
    run.counts[kZeroAdvantage] += (advantage == 0.0f) & keep;
    run.sums[kRatio] += masked(ratio, keep);
    run.sums[kLogRatio] += log_ratio;
    run.sums[kOldK3] += e.rest;
    run.sums[kAdvantage] += advantage;
    run.sums[kLogp] += logp;
    const Ints unordered = ratio != ratio;
    run.ratio_min = select(((ratio < run.ratio_min) | unordered) & keep, ratio, run.ratio_min);
    run.ratio_max = select(((ratio > run.ratio_max) | unordered) & keep, ratio, run.ratio_max);
}

// Lane by lane in double; the lanes are added at the end of the block.
struct Wide {
    double sums[kSums][kLanes];
};

RLCORE_INLINE void widen(Running& run, Wide& wide) {
    for (int k = 0; k < kSums; ++k) {
        for (int lane = 0; lane < kLanes; ++lane) wide.sums[k][lane] += static_cast<double>(run.sums[k][lane]);
        run.sums[k] = Floats{};
    }
}

RLCORE_INLINE double total(const double* lanes) {
    double sum = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    return sum;
}

RLCORE_INLINE std::int64_t total(Ints count) {
    std::int64_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum -= count[lane];
    return sum;
}

// A NaN, once met, stays.
RLCORE_INLINE float extreme(Floats x, float sign) {
    float best = x[0];
    for (int lane = 1; lane < kLanes; ++lane) {
        if (sign * x[lane] > sign * best || x[lane] != x[lane]) best = x[lane];
    }
    return best;
}

void add_block(const PolicyRows& rows, const PolicyRule& rule, std::int64_t start, std::int64_t stop, PolicySums& out) {
    Running run = {};
    run.ratio_min = broadcast(__builtin_inff());
    run.ratio_max = broadcast(-__builtin_inff());
    Wide wide = {};
    std::int64_t i = start;
    while (i + kLanes <= stop) {
        for (std::int64_t v = 0; v < kShort && i + kLanes <= stop; ++v, i += kLanes) {
            add_rows<true>(rows, rule, i, kLanes, run);
        }
        widen(run, wide);
    }
    if (i < stop) {
        add_rows<false>(rows, rule, i, stop - i, run);
        widen(run, wide);
    }
    double s[kSums];
    for (int k = 0; k < kSums; ++k) s[k] = total(wide.sums[k]);
    out = {s[kPolicy],
           s[kKl],
           s[kEntropyTerm],
           s[kRatio],
           s[kLogRatio],
           s[kOldK3],
           s[kAdvantage],
           s[kLogp],
           s[kEntropy],
           s[kRefK1],
           s[kRefK3],
           s[kDifference],
           s[kRolloutK3],
           s[kWeight],
           s[kWeightSquared],
           total(run.counts[kTokens]),
           total(run.counts[kBelow]),
           total(run.counts[kAbove]),
           total(run.counts[kClipped]),
           total(run.counts[kZeroAdvantage]),
           total(run.counts[kDualClipped]),
           total(run.counts[kCorrected]),
           extreme(run.ratio_min, -1.0f),
           extreme(run.ratio_max, 1.0f),
           extreme(run.difference_max, 1.0f)};
}

}  // namespace

void policy_rows(const PolicyRows& rows, const PolicyRule& rule, std::int64_t n, PolicySums* sums, int threads) {
    // A block is 10 microseconds of one thread (two threads are faster from two blocks on).
    threads = team(n, kPolicyBlock, threads);
    (void)threads;  // read by the pragma alone
    const std::int64_t blocks = (n + kPolicyBlock - 1) / kPolicyBlock;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t start = b * kPolicyBlock;
        add_block(rows, rule, start, start + kPolicyBlock < n ? start + kPolicyBlock : n, sums[b]);
    }
}

}  // namespace rlcore::cpu::RLCORE_ISA
