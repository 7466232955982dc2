// Python module rlcore._cuda: raw device pointers and a stream as integers, sizes and strides in elements. Nothing here
// reads device memory or waits for it. The caller keeps the memory alive until the stream has passed.
//
// tests/emulated.py compiles the same file over emulate/cuda.h: there the pointers are to host memory.
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cuda/launch.h"
#include "cuda/policy_loss.h"
#include "cuda/segments.h"
#include "cuda/vocab_head.h"

namespace py = pybind11;

namespace {

using rlcore::cuda::Type;

void check(int error) {
    if (error < 0) throw std::invalid_argument("dtypes: no kernel for these");
    if (error != 0) throw std::runtime_error(cudaGetErrorString(static_cast<cudaError_t>(error)));
}

void expect(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

Type type_of(const std::string& name) {
    if (name == "float32") return Type::float32;
    if (name == "bfloat16") return Type::bfloat16;
    if (name == "float16") return Type::float16;
    throw std::invalid_argument("dtype: expected 'float32', 'bfloat16' or 'float16', got '" + name + "'");
}

void* stream_of(std::uintptr_t stream) { return reinterpret_cast<void*>(stream); }

void* memory(std::uintptr_t address, Type type, const char* name, bool may_be_null) {
    if (type == Type::float32) return pointer<float>(address, name, may_be_null);
    return pointer<std::uint16_t>(address, name, may_be_null);
}

// A number as (address of elements on the device, their stride, value where the address is 0).
using Number = std::tuple<std::uintptr_t, std::int64_t, float>;

rlcore::cuda::Number number_of(const Number& x, const char* name) {
    return {pointer<const float>(std::get<0>(x), name, true), std::get<1>(x), std::get<2>(x)};
}

// Logits as (address, dtype, row stride, rows, columns), then their scale.
using Chunk = std::tuple<std::uintptr_t, std::string, std::int64_t, std::int64_t, std::int64_t>;
using Scale = std::tuple<std::uintptr_t, Number, Number, std::optional<Number>>;  // bias, temperature, scale, cap

rlcore::cuda::Logits logits_of(const Chunk& chunk, const Scale& scale, std::uintptr_t target) {
    const auto& [address, type, row_stride, rows, columns] = chunk;
    if (rows < 0 || columns < 1 || columns > rlcore::cuda::kMostColumns || row_stride < columns) {
        throw std::invalid_argument(
            "logits: expected rows >= 0, 1 to 2^30 columns and a row stride of at least the columns");
    }
    const auto& cap = std::get<3>(scale);
    return {memory(address, type_of(type), "logits", rows == 0),
            type_of(type),
            row_stride,
            rows,
            columns,
            pointer<const std::int64_t>(target, "target", rows == 0),
            pointer<const float>(std::get<0>(scale), "bias", true),
            number_of(std::get<1>(scale), "temperature"),
            number_of(std::get<2>(scale), "scale"),
            cap.has_value(),
            number_of(cap.value_or(Number{}), "cap")};
}

// Addresses of maximum, log_sum, logp and entropy (0: not asked for).
using Addresses = std::array<std::uintptr_t, 4>;

rlcore::cuda::Statistics statistics_of(const Addresses& out, std::int64_t rows) {
    return {pointer<float>(out[0], "maximum", rows == 0), pointer<float>(out[1], "log_sum", rows == 0),
            pointer<float>(out[2], "logp", rows == 0), pointer<float>(out[3], "entropy", true)};
}

void vocab_head_statistics(const Chunk& chunk, const Scale& scale, std::uintptr_t target, const Addresses& out,
                           std::uintptr_t stream) {
    const auto logits = logits_of(chunk, scale, target);
    check(rlcore::cuda::statistics(logits, statistics_of(out, logits.rows), stream_of(stream)));
}

void vocab_head_gradient(const Chunk& chunk, const Scale& scale, std::uintptr_t target, const Addresses& statistics,
                         std::uintptr_t d_logp, std::uintptr_t d_entropy, std::uintptr_t out,
                         const std::string& out_type, std::int64_t out_stride, std::uintptr_t stream) {
    const auto logits = logits_of(chunk, scale, target);
    const bool none = logits.rows == 0;
    const rlcore::cuda::Coefficients d = {pointer<const float>(d_logp, "d_logp", none),
                                          pointer<const float>(d_entropy, "d_entropy", true)};
    if (d.entropy != nullptr) pointer<const float>(statistics[3], "entropy", none);
    if (out_stride < logits.columns) throw std::invalid_argument("out: expected a stride of at least the columns");
    const rlcore::cuda::Output to = {memory(out, type_of(out_type), "out", none), type_of(out_type), out_stride};
    check(rlcore::cuda::gradient(logits, statistics_of(statistics, logits.rows), d, to, stream_of(stream)));
}

// A coefficient as (address or 0, stride, number).
using Coefficient = std::tuple<std::uintptr_t, std::int64_t, double>;

template <typename T>
rlcore::cuda::PerRow<T> per_row(const Coefficient& c) {
    return {pointer<const T>(std::get<0>(c), "coefficient", true), std::get<1>(c), static_cast<T>(std::get<2>(c))};
}

// kind "scan": inputs (delta), coefficients (decay), outputs (y); "gae": (reward, value), (gamma, lam), (advantage,
// returns); "vtrace": (reward, value, log_ratio), (gamma, lam), (advantage, returns), bounds (rho_bar, c_bar).
template <typename T>
void scan_of(const std::string& kind, const std::vector<std::uintptr_t>& inputs,
             const std::vector<Coefficient>& coefficients, const std::vector<std::uintptr_t>& outputs,
             const std::array<double, 2>& bounds, const rlcore::cuda::Time<T>& time, bool none, void* stream) {
    const auto in = [&](std::size_t i) { return pointer<const T>(inputs.at(i), "input", none); };
    const auto out = [&](std::size_t i) { return pointer<T>(outputs.at(i), "output", none); };
    const auto c = [&](std::size_t i) { return per_row<T>(coefficients.at(i)); };
    if (kind == "scan") {
        check(rlcore::cuda::reverse_scan(time, in(0), c(0), out(0), stream));
    } else if (kind == "gae") {
        check(rlcore::cuda::gae(time, in(0), in(1), c(0), c(1), out(0), out(1), stream));
    } else {
        expect(kind == "vtrace", "kind: expected 'scan', 'gae' or 'vtrace'");
        check(rlcore::cuda::vtrace(time, in(0), in(1), in(2), c(0), c(1), static_cast<T>(bounds[0]),
                                   static_cast<T>(bounds[1]), out(0), out(1), stream));
    }
}

void scan(const std::string& kind, const std::vector<std::uintptr_t>& inputs,
          const std::vector<Coefficient>& coefficients, const std::vector<std::uintptr_t>& outputs,
          const std::array<double, 2>& bounds, std::int64_t rows, std::uintptr_t offsets, std::int64_t count,
          std::uintptr_t mask, std::uintptr_t bootstrap, const std::string& dtype, std::uintptr_t stream) {
    expect(rows >= 0 && count >= 0, "rows, count: expected numbers >= 0");
    const auto* first = pointer<const std::int64_t>(offsets, "offsets", false);
    const auto* keep = pointer<const std::uint8_t>(mask, "mask", true);
    const bool none = rows == 0;
    if (dtype == "float32") {
        const auto* after = pointer<const float>(bootstrap, "bootstrap", true);
        scan_of<float>(kind, inputs, coefficients, outputs, bounds, {first, count, keep, after}, none,
                       stream_of(stream));
    } else {
        expect(dtype == "float64", "dtype: expected 'float32' or 'float64'");
        const auto* after = pointer<const double>(bootstrap, "bootstrap", true);
        scan_of<double>(kind, inputs, coefficients, outputs, bounds, {first, count, keep, after}, none,
                        stream_of(stream));
    }
}

void group_advantage(std::uintptr_t reward, std::uintptr_t group, std::uintptr_t weight, std::uintptr_t mask,
                     std::int64_t n, const std::string& center, const std::string& scale, bool spread_of_residual,
                     double ddof, double eps, std::uintptr_t out, std::uintptr_t stream) {
    using rlcore::cuda::Center;
    using rlcore::cuda::Scale;
    expect(n >= 0 && n <= rlcore::cuda::kMostRewards, "n: expected 0 to 2^14 rewards");
    rlcore::cuda::Advantage job = {};
    job.reward = pointer<const double>(reward, "reward", n == 0);
    job.group = pointer<const std::int64_t>(group, "group", true);
    job.weight = pointer<const double>(weight, "weight", true);
    job.mask = pointer<const std::uint8_t>(mask, "mask", true);
    job.n = n;
    job.center = center == "group"           ? Center::group
                 : center == "leave_one_out" ? Center::leave_one_out
                 : center == "batch"         ? Center::batch
                                             : Center::none;
    job.scale = scale == "group" ? Scale::group : scale == "batch" ? Scale::batch : Scale::none;
    job.spread_of_residual = spread_of_residual;
    job.ddof = ddof;
    job.eps = eps;
    job.out = pointer<double>(out, "out", n == 0);
    check(rlcore::cuda::group_advantage(job, stream_of(stream)));
}

// Ratio ("none", "token", "unit"), surrogate, estimator ("" for none), aggregate; dual clip, correction, entropy term.
using Structure = std::tuple<std::string, std::string, std::string, std::string, bool, bool, bool>;

template <typename T>
T one_of(const std::string& name, const std::vector<const char*>& names, const char* message) {
    for (std::size_t i = 0; i < names.size(); ++i) {
        if (name == names[i]) return static_cast<T>(i);
    }
    throw std::invalid_argument(message);
}

// numbers: clip_low, clip_high, dual_clip, cap, kl, entropy, length.
rlcore::cuda::PolicyRule rule_of(const Structure& structure, const std::array<double, 7>& numbers) {
    using namespace rlcore::cuda;
    const auto& [ratio, surrogate, estimator, aggregate, dual_clip, correction, entropy_term] = structure;
    const auto number = [&](std::size_t i) { return static_cast<float>(numbers[i]); };
    PolicyRule rule = {};
    rule.ratio = one_of<Ratio>(ratio, {"none", "token", "unit"}, "ratio: unknown");
    rule.surrogate = one_of<Surrogate>(surrogate, {"ppo", "cispo", "reinforce"}, "surrogate: unknown");
    rule.estimator = one_of<Estimator>(estimator, {"", "k1", "k2", "k3"}, "estimator: unknown");
    rule.aggregate = one_of<Aggregate>(
        aggregate, {"token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"},
        "aggregate: unknown");
    rule.has_dual_clip = dual_clip;
    rule.has_correction = correction;
    rule.has_entropy_term = entropy_term;
    rule.clip_low = number(0);
    rule.clip_high = number(1);
    rule.dual_clip = number(2);
    rule.cap = number(3);
    rule.kl = number(4);
    rule.entropy = number(5);
    rule.length = number(6);
    return rule;
}

// fields: addresses in the order of PolicyFields, 0 where there is none; totals: of tokens and sequences.
rlcore::cuda::PolicyJob job_of(const std::array<std::uintptr_t, 12>& fields,
                               const std::array<std::uintptr_t, 2>& totals, const Structure& structure,
                               const std::array<double, 7>& numbers, std::int64_t rows) {
    using rlcore::cuda::Estimator;
    expect(rows >= 0, "rows: expected a number >= 0");
    const bool none = rows == 0;
    rlcore::cuda::PolicyJob job = {};
    job.rule = rule_of(structure, numbers);
    job.n = rows;
    job.in.logp = pointer<const float>(fields[0], "logp", none);
    job.in.entropy = pointer<const float>(fields[1], "entropy", none || !job.rule.has_entropy_term);
    job.in.advantage = pointer<const float>(fields[2], "advantage", none);
    job.in.old_logp = pointer<const float>(fields[3], "old_logp", true);
    job.in.ref_logp = pointer<const float>(fields[4], "ref_logp", none || job.rule.estimator == Estimator::none);
    job.in.rollout_logp = pointer<const float>(fields[5], "rollout_logp", none || !job.rule.has_correction);
    job.in.weight = pointer<const float>(fields[6], "weight", true);
    job.in.clip_low = pointer<const float>(fields[7], "clip_low", true);
    job.in.clip_high = pointer<const float>(fields[8], "clip_high", true);
    job.in.mask = pointer<const std::uint8_t>(fields[9], "mask", true);
    job.in.kl_mask = pointer<const std::uint8_t>(fields[10], "kl_mask", true);
    job.in.coefficient = pointer<const float>(fields[11], "coefficient", true);
    job.tokens = pointer<const float>(totals[0], "totals", false);
    job.sequences = pointer<const float>(totals[1], "totals", false);
    return job;
}

// units: addresses of borders, order and known, then their count; shared: of mean, through and share.
void policy_units(const std::array<std::uintptr_t, 12>& fields, const std::array<std::uintptr_t, 2>& totals,
                  const Structure& structure, const std::array<double, 7>& numbers, std::int64_t rows,
                  const std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int64_t>& units,
                  const std::array<std::uintptr_t, 3>& shared, std::uintptr_t stream) {
    rlcore::cuda::PolicyJob job = job_of(fields, totals, structure, numbers, rows);
    const auto& [borders, order, known, count] = units;
    expect(count >= 0, "units: expected a number >= 0");
    job.units = {pointer<const std::int64_t>(borders, "borders", false),
                 pointer<const std::int64_t>(order, "order", true), pointer<const std::int64_t>(known, "known", true),
                 count};
    job.shared = {pointer<float>(shared[0], "mean", true), pointer<float>(shared[1], "through", true),
                  pointer<float>(shared[2], "share", true)};
    check(rlcore::cuda::policy_units(job, stream_of(stream)));
}

// shared: addresses of mean and through; outputs: of d_logp, d_entropy, scratch, loss and metrics.
void policy_loss(const std::array<std::uintptr_t, 12>& fields, const std::array<std::uintptr_t, 2>& totals,
                 const Structure& structure, const std::array<double, 7>& numbers, std::int64_t rows,
                 const std::array<std::uintptr_t, 2>& shared, const std::array<std::uintptr_t, 5>& outputs,
                 unsigned chosen, std::uintptr_t stream) {
    using rlcore::cuda::Aggregate;
    using rlcore::cuda::Ratio;
    rlcore::cuda::PolicyJob job = job_of(fields, totals, structure, numbers, rows);
    expect(rows == 0 || job.in.coefficient != nullptr || job.rule.aggregate != Aggregate::sequence_mean,
           "coefficient: needed for seq_mean_token_mean");
    job.shared.mean = pointer<float>(shared[0], "mean", rows == 0 || job.rule.ratio != Ratio::unit);
    job.shared.through = pointer<float>(shared[1], "through", true);
    job.d_logp = pointer<float>(outputs[0], "d_logp", true);
    job.d_entropy = pointer<float>(outputs[1], "d_entropy", true);
    job.scratch = pointer<float>(outputs[2], "scratch", false);
    job.loss = pointer<float>(outputs[3], "loss", false);
    job.metrics = pointer<float>(outputs[4], "metrics", false);
    job.chosen = chosen;
    check(rlcore::cuda::policy_loss(job, stream_of(stream)));
}

py::dict features() {
    py::dict out;
#if defined(CUDART_VERSION)
    out["cuda"] = CUDART_VERSION;
#else
    out["cuda"] = 0;  // emulated
#endif
    return out;
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
    m.doc() =
        "CUDA kernels of rlcore over raw device memory. Use the functions of rlcore.ops, which check their tensors.";
    m.def("features", &features, "The version of the CUDA runtime inside; 0 where it is emulated.");
    m.attr("MOST_REWARDS") = rlcore::cuda::kMostRewards;
    m.def("scan", &scan, "A reverse scan over packed sequences; see csrc/cuda/segments.h.");
    m.def("group_advantage", &group_advantage, "Advantages by groups; see csrc/cuda/segments.h.");
    m.def("policy_units", &policy_units, "What rows of a sequence or segment share; see csrc/cuda/policy_loss.h.");
    m.def("policy_loss", &policy_loss, "Loss, gradients and metrics of a batch; see csrc/cuda/policy_loss.h.");
    m.def("policy_loss_scratch", &rlcore::cuda::policy_loss_scratch,
          "The float32 numbers that `policy_loss` works in.");
    m.def("vocab_head_statistics", &vocab_head_statistics, "Row pass 1; see csrc/cuda/vocab_head.h.");
    m.def("vocab_head_gradient", &vocab_head_gradient, "Row pass 2; see csrc/cuda/vocab_head.h.");
}
