#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/policy_loss.h"
#include "cpu/team.h"

namespace rlcore::cpu {
namespace {

// Rows of a thread, at least, in the sums over sequences and segments.
constexpr std::int64_t kRowsPerThread = 1 << 14;

bool counts(const PolicyRows& rows, std::int64_t i) { return rows.mask == nullptr || rows.mask[i] != 0; }

// Calls fn(row, unit) for all unmasked rows; rows of one unit in rising order by one thread. Units given by offsets run
// in parallel, units given by ids, which may interleave, in one thread.
template <typename Fn>
void each_row(const PolicyRows& rows, std::int64_t n, const Units& units, int threads, Fn fn) {
    if (units.offsets == nullptr) {
        for (std::int64_t i = 0; i < n; ++i) {
            if (counts(rows, i)) fn(i, units.ids[i] - units.base);
        }
        return;
    }
    threads = team(n, kRowsPerThread, threads);
    (void)threads;  // read by the pragma alone
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t u = 0; u < units.count; ++u) {
        for (std::int64_t i = units.offsets[u]; i < units.offsets[u + 1]; ++i) {
            if (counts(rows, i)) fn(i, u);
        }
    }
}

// The mean over a unit's unmasked rows, given back to each of them.
class UnitMean {
  public:
    UnitMean(const PolicyRows& rows, std::int64_t n, const Units& units, int threads)
        : rows_(rows),
          n_(n),
          units_(units),
          threads_(threads),
          count_(static_cast<std::size_t>(units.count)),
          sum_(static_cast<std::size_t>(units.count)) {
        double* count = count_.data();
        each_row(rows_, n_, units_, threads_, [count](std::int64_t, std::int64_t u) { count[u] += 1.0; });
    }

    template <typename Value, typename Use>
    void run(Value value, Use use) {
        double* sum = sum_.data();
        std::fill(sum_.begin(), sum_.end(), 0.0);
        each_row(rows_, n_, units_, threads_, [=](std::int64_t i, std::int64_t u) { sum[u] += value(i); });
        const double* count = count_.data();
        each_row(rows_, n_, units_, threads_,
                 [=](std::int64_t i, std::int64_t u) { use(i, static_cast<float>(sum[u] / count[u])); });
    }

  private:
    const PolicyRows& rows_;
    std::int64_t n_;
    const Units& units_;
    int threads_;
    std::vector<double> count_;
    std::vector<double> sum_;
};

void sequence_mean_coefficients(const PolicyRows& rows, std::int64_t n, const std::int64_t* offsets,
                                std::int64_t sequences, float denominator, int threads, float* coefficient) {
    threads = team(n, kRowsPerThread, threads);
    (void)threads;  // read by the pragma alone
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t s = 0; s < sequences; ++s) {
        std::int64_t tokens = 0;
        for (std::int64_t i = offsets[s]; i < offsets[s + 1]; ++i) tokens += counts(rows, i) ? 1 : 0;
        const float c = 1.0f / (static_cast<float>(std::max<std::int64_t>(tokens, 1)) * denominator);
        std::fill(coefficient + offsets[s], coefficient + offsets[s + 1], c);
    }
}

float smaller(float a, float b) { return b < a || b != b ? b : a; }
float greater(float a, float b) { return b > a || b != b ? b : a; }

PolicySums added(const std::vector<PolicySums>& blocks) {
    PolicySums total = blocks[0];
    for (std::size_t b = 1; b < blocks.size(); ++b) {
        const PolicySums& x = blocks[b];
        for (double PolicySums::* term :
             {&PolicySums::policy, &PolicySums::kl, &PolicySums::entropy_term, &PolicySums::ratio,
              &PolicySums::log_ratio, &PolicySums::old_k3, &PolicySums::advantage, &PolicySums::logp,
              &PolicySums::entropy, &PolicySums::ref_k1, &PolicySums::ref_k3, &PolicySums::rollout_difference,
              &PolicySums::rollout_k3, &PolicySums::weight, &PolicySums::weight_squared}) {
            total.*term += x.*term;
        }
        for (std::int64_t PolicySums::* count :
             {&PolicySums::tokens, &PolicySums::below, &PolicySums::above, &PolicySums::clipped,
              &PolicySums::zero_advantage, &PolicySums::dual_clipped, &PolicySums::corrected}) {
            total.*count += x.*count;
        }
        total.ratio_min = smaller(total.ratio_min, x.ratio_min);
        total.ratio_max = greater(total.ratio_max, x.ratio_max);
        total.difference_max = greater(total.difference_max, x.difference_max);
    }
    return total;
}

// In the order of rlcore.algorithms.policy_loss_metrics.metric_names.
int write_metrics(const PolicyRows& rows, const PolicyRule& rule, const PolicySums& s, const Totals& totals,
                  float* loss, float* metrics) {
    float* out = metrics;
    const double tokens = static_cast<double>(totals.tokens);
    const auto put = [&out](double x) { *out++ = static_cast<float>(x); };
    const auto share = [&put, tokens](std::int64_t count) { put(static_cast<double>(count) / tokens); };
    put(static_cast<double>(s.tokens));
    put(s.ratio / tokens);
    put(static_cast<double>(s.ratio_min));
    put(static_cast<double>(s.ratio_max));
    share(s.below);
    share(s.above);
    share(s.clipped);
    put(-s.log_ratio / tokens);
    put(s.old_k3 / tokens);
    share(s.zero_advantage);
    put(s.advantage / tokens);
    if (rule.has_dual_clip) share(s.dual_clipped);
    float total = static_cast<float>(s.policy);
    put(s.policy);
    if (rule.kl != Estimator::none) {
        const float term = static_cast<float>(static_cast<double>(rule.kl_coefficient) * s.kl);
        put(static_cast<double>(term));
        total += term;
    }
    if (rule.has_entropy_term) {
        const float term = static_cast<float>(-static_cast<double>(rule.entropy_coefficient) * s.entropy_term);
        put(static_cast<double>(term));
        total += term;
    }
    put(s.logp / tokens);
    if (rows.entropy != nullptr) put(s.entropy / tokens);
    if (rows.ref_logp != nullptr) {
        put(s.ref_k1 / tokens);
        put(s.ref_k3 / tokens);
    }
    if (rows.rollout_logp != nullptr) {
        const double squares = static_cast<double>(s.tokens) * s.weight_squared;
        put(-s.rollout_difference / tokens);
        put(s.rollout_k3 / tokens);
        put(static_cast<double>(s.difference_max));
        put(s.weight);
        put(s.weight_squared);
        put(squares > 0.0 ? s.weight * s.weight / squares : 1.0);
        if (rule.has_correction) share(s.corrected);
    }
    put(static_cast<double>(total));
    *loss = total;
    return static_cast<int>(out - metrics);
}

}  // namespace

int policy_loss(PolicyRows rows, const PolicyRule& rule, std::int64_t n, const Units& units,
                const std::int64_t* sequence_mean, std::int64_t sequences, const Totals& totals, int threads,
                float* loss, float* metrics) {
    const auto size = static_cast<std::size_t>(n);
    std::unique_ptr<float[]> coefficient, mean, through;
    if (sequence_mean != nullptr) {
        coefficient.reset(new float[size]);
        sequence_mean_coefficients(rows, n, sequence_mean, sequences, totals.sequences, threads, coefficient.get());
        rows.coefficient = coefficient.get();
    }
    std::vector<PolicySums> sums(
        static_cast<std::size_t>(std::max<std::int64_t>((n + kPolicyBlock - 1) / kPolicyBlock, 1)));
    if (n == 0) {
        sums[0].ratio_min = std::numeric_limits<float>::infinity();
        sums[0].ratio_max = -std::numeric_limits<float>::infinity();
    }
    if (rule.ratio != Ratio::unit) {
        RLCORE_CALL(policy_rows, rows, rule, n, sums.data(), threads);
        return write_metrics(rows, rule, added(sums), totals, loss, metrics);
    }
    mean.reset(new float[size]);
    rows.unit_mean = mean.get();
    UnitMean of_unit(rows, n, units, threads);
    const float* logp = rows.logp;
    const float* old_logp = rows.old_logp == nullptr ? logp : rows.old_logp;
    float* row_mean = mean.get();
    of_unit.run([=](std::int64_t i) { return static_cast<double>(logp[i] - old_logp[i]); },
                [=](std::int64_t i, float m) { row_mean[i] = m; });
    const bool flows = rows.d_logp != nullptr && rule.surrogate != Surrogate::cispo;
    if (flows) {
        through.reset(new float[size]);
        rows.through = through.get();
    }
    RLCORE_CALL(policy_rows, rows, rule, n, sums.data(), threads);
    if (flows) {
        const float* row_through = through.get();
        float* d_logp = rows.d_logp;
        of_unit.run([=](std::int64_t i) { return static_cast<double>(row_through[i]); },
                    [=](std::int64_t i, float m) { d_logp[i] += m; });
    }
    return write_metrics(rows, rule, added(sums), totals, loss, metrics);
}

}  // namespace rlcore::cpu
