#include <algorithm>

#include "bindings.h"
#include "cpu/policy_loss.h"

namespace py = pybind11;

namespace {

using rlcore::cpu::Estimator;
using rlcore::cpu::PolicyRows;
using rlcore::cpu::PolicyRule;
using rlcore::cpu::Ratio;
using rlcore::cpu::Surrogate;
using rlcore::cpu::Totals;
using rlcore::cpu::Units;

constexpr std::size_t kFields = 15;
constexpr std::size_t kNumbers = 7;

void expect(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

template <typename T>
T* address(const py::sequence& from, std::size_t i, const char* name, bool may_be_null) {
    return pointer<T>(from[i].cast<std::uintptr_t>(), name, may_be_null);
}

double number(const py::sequence& numbers, std::size_t i) {
    return *address<const double>(numbers, i, "numbers", false);
}

Ratio ratio_of(const std::string& name) {
    if (name == "none") return Ratio::none;
    if (name == "token") return Ratio::token;
    expect(name == "unit", "ratio: expected 'none', 'token' or 'unit'");
    return Ratio::unit;
}

Surrogate surrogate_of(const std::string& name) {
    if (name == "ppo") return Surrogate::ppo;
    if (name == "cispo") return Surrogate::cispo;
    expect(name == "reinforce", "surrogate: expected 'ppo', 'cispo' or 'reinforce'");
    return Surrogate::reinforce;
}

Estimator estimator_of(const std::string& name) {
    if (name.empty()) return Estimator::none;
    if (name == "k1") return Estimator::k1;
    if (name == "k2") return Estimator::k2;
    expect(name == "k3", "estimator: expected '', 'k1', 'k2' or 'k3'");
    return Estimator::k3;
}

// fields: addresses of logp, entropy, advantage, old_logp, ref_logp, rollout_logp, weight, clip_low, clip_high, mask,
// kl_mask, coefficient, d_logp, d_entropy, unit ids; 0 where there is none. numbers: addresses of clip_low, clip_high,
// dual_clip, cap, kl, entropy, length (float64). totals: addresses of tokens and sequences (float32).
int policy_loss(const py::sequence& fields, const py::sequence& numbers, const py::sequence& totals, std::int64_t rows,
                std::uintptr_t offsets_ptr, std::int64_t sequences, const std::string& ratio,
                const std::string& surrogate, const std::string& estimator, const std::string& aggregate,
                bool dual_clip, bool correction, bool entropy_term, std::int64_t unit_base, std::int64_t unit_count,
                std::uintptr_t loss_ptr, std::uintptr_t metrics_ptr, int threads) {
    expect(fields.size() == kFields, "fields: expected 15 addresses");
    expect(numbers.size() == kNumbers, "numbers: expected 7 addresses");
    expect(totals.size() == 2, "totals: expected 2 addresses");
    expect(rows >= 0 && sequences >= 0 && threads >= 1, "rows, sequences, threads: expected rows >= 0, threads >= 1");
    const bool none = rows == 0;
    PolicyRows r = {};
    r.logp = address<const float>(fields, 0, "logp", none);
    r.entropy = address<const float>(fields, 1, "entropy", !entropy_term || none);
    r.advantage = address<const float>(fields, 2, "advantage", none);
    r.old_logp = address<const float>(fields, 3, "old_logp", true);
    r.ref_logp = address<const float>(fields, 4, "ref_logp", estimator.empty() || none);
    r.rollout_logp = address<const float>(fields, 5, "rollout_logp", !correction || none);
    r.weight = address<const float>(fields, 6, "weight", true);
    r.clip_low = address<const float>(fields, 7, "clip_low", true);
    r.clip_high = address<const float>(fields, 8, "clip_high", true);
    r.mask = address<const std::uint8_t>(fields, 9, "mask", true);
    r.kl_mask = address<const std::uint8_t>(fields, 10, "kl_mask", true);
    r.coefficient = address<const float>(fields, 11, "coefficient", true);
    r.d_logp = address<float>(fields, 12, "d_logp", true);
    r.d_entropy = address<float>(fields, 13, "d_entropy", true);
    const auto* ids = address<const std::int64_t>(fields, 14, "units", true);
    const auto* offsets = pointer<const std::int64_t>(offsets_ptr, "offsets", true);
    if (offsets != nullptr) {
        check_offsets(offsets, sequences);
        expect(offsets[0] == 0 && offsets[sequences] == rows, "offsets: expected to rise from 0 to the number of rows");
    }

    PolicyRule rule = {};
    rule.ratio = ratio_of(ratio);
    rule.surrogate = surrogate_of(surrogate);
    rule.kl = estimator_of(estimator);
    rule.has_dual_clip = dual_clip;
    rule.has_correction = correction;
    rule.has_entropy_term = entropy_term;
    rule.clip_low = static_cast<float>(number(numbers, 0));
    rule.clip_high = static_cast<float>(number(numbers, 1));
    rule.dual_clip = static_cast<float>(number(numbers, 2));
    rule.cap = static_cast<float>(number(numbers, 3));
    rule.kl_coefficient = static_cast<float>(number(numbers, 4));
    rule.entropy_coefficient = static_cast<float>(number(numbers, 5));
    const Totals t = {std::max(*address<const float>(totals, 0, "totals", false), 1.0f),
                      std::max(*address<const float>(totals, 1, "totals", false), 1.0f)};
    const std::int64_t* sequence_mean = nullptr;
    if (r.coefficient == nullptr) {
        if (aggregate == "token_mean") {
            r.uniform = 1.0f / t.tokens;
        } else if (aggregate == "seq_mean_token_sum") {
            r.uniform = 1.0f / t.sequences;
        } else if (aggregate == "seq_mean_token_sum_norm") {
            r.uniform = 1.0f / (t.sequences * static_cast<float>(number(numbers, 6)));
        } else {
            expect(aggregate == "seq_mean_token_mean", "aggregate: unknown");
            expect(offsets != nullptr, "offsets: needed for seq_mean_token_mean");
            sequence_mean = offsets;
        }
    }
    Units units = {ids == nullptr ? offsets : nullptr, ids, unit_base, ids == nullptr ? sequences : unit_count};
    if (rule.ratio == Ratio::unit) {
        expect(ids != nullptr || offsets != nullptr, "units: needed for ratio 'unit', or offsets");
        for (std::int64_t i = 0; ids != nullptr && i < rows; ++i) {
            expect(ids[i] >= unit_base && ids[i] - unit_base < unit_count, "units: an id is out of range");
        }
    }
    auto* loss = pointer<float>(loss_ptr, "loss", false);
    auto* metrics = pointer<float>(metrics_ptr, "metrics", false);
    py::gil_scoped_release release;
    return rlcore::cpu::policy_loss(r, rule, rows, units, sequence_mean, sequences, t, threads, loss, metrics);
}

}  // namespace

void bind_policy_loss(py::module_& m) {
    m.attr("POLICY_LOSS_METRICS") = rlcore::cpu::kMostMetrics;
    m.def("policy_loss", &policy_loss,
          "Loss, gradients and metrics of a float32 batch; see csrc/cpu/policy_loss.h. Returns the number of metrics.");
}
