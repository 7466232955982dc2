// Python module rlcore._native: raw data pointers as integers, sizes and strides in elements, no copies.
// The caller keeps the memory alive and sees to it that every offset lies inside the values.
#include "bindings.h"

#include "cpu/dispatch.h"
#include "cpu/vocab_head.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
    return "Clang " __clang_version__;
#elif defined(__GNUC__)
    return "GCC " __VERSION__;
#elif defined(_MSC_VER)
    return "MSVC " + std::to_string(_MSC_VER);
#else
    return "unknown";
#endif
}

rlcore::cpu::Logits logits_of(std::uintptr_t logits, std::int64_t row_stride, std::int64_t rows, std::int64_t columns,
                              std::uintptr_t target, std::uintptr_t temperature, std::int64_t temperature_stride,
                              float scale, float cap) {
    if (rows < 0 || columns < 1 || row_stride < columns) {
        throw std::invalid_argument(
            "logits: expected rows >= 0, columns >= 1 and a row stride of at least the columns");
    }
    return {pointer<float>(logits, "logits", rows == 0),
            row_stride,
            rows,
            columns,
            pointer<const std::int64_t>(target, "target", rows == 0),
            pointer<const float>(temperature, "temperature", rows == 0),
            temperature_stride,
            scale,
            cap};
}

rlcore::cpu::Statistics statistics_of(std::uintptr_t maximum, std::uintptr_t log_sum, std::uintptr_t logp,
                                      std::uintptr_t entropy, std::int64_t rows) {
    return {pointer<float>(maximum, "maximum", rows == 0), pointer<float>(log_sum, "log_sum", rows == 0),
            pointer<float>(logp, "logp", rows == 0), pointer<float>(entropy, "entropy", true)};
}

void vocab_head_statistics(std::uintptr_t logits, std::int64_t row_stride, std::int64_t rows, std::int64_t columns,
                           std::uintptr_t target, std::uintptr_t temperature, std::int64_t temperature_stride,
                           float scale, float cap, std::uintptr_t maximum, std::uintptr_t log_sum, std::uintptr_t logp,
                           std::uintptr_t entropy, int threads) {
    const auto chunk =
        logits_of(logits, row_stride, rows, columns, target, temperature, temperature_stride, scale, cap);
    RLCORE_CALL(statistics, chunk, statistics_of(maximum, log_sum, logp, entropy, rows), threads);
}

void vocab_head_gradient(std::uintptr_t logits, std::int64_t row_stride, std::int64_t rows, std::int64_t columns,
                         std::uintptr_t target, std::uintptr_t temperature, std::int64_t temperature_stride,
                         float scale, float cap, std::uintptr_t maximum, std::uintptr_t log_sum, std::uintptr_t entropy,
                         std::uintptr_t d_logp, std::uintptr_t d_entropy, std::uintptr_t keep, std::int64_t kept,
                         bool raw, int threads) {
    const auto chunk =
        logits_of(logits, row_stride, rows, columns, target, temperature, temperature_stride, scale, cap);
    const rlcore::cpu::Coefficients d = {pointer<const float>(d_logp, "d_logp", rows == 0),
                                         pointer<const float>(d_entropy, "d_entropy", true)};
    const auto* indices = pointer<const std::int64_t>(keep, "keep", true);
    if (kept < 0 || kept > rows) throw std::invalid_argument("kept: expected a number of rows from 0 to rows");
    for (std::int64_t i = 0; indices != nullptr && i < kept; ++i) {
        if (indices[i] < i || indices[i] >= rows || (i > 0 && indices[i] <= indices[i - 1])) {
            throw std::invalid_argument("keep: expected rising row numbers below rows");
        }
    }
    RLCORE_CALL(gradient, chunk, statistics_of(maximum, log_sum, maximum, entropy, rows), d, indices, kept, raw,
                threads);
}

py::dict features() {
    py::dict out;
    out["compiler"] = compiler();
    out["cxx_standard"] = static_cast<long>(__cplusplus) / 100 % 100;
#ifdef _OPENMP
    out["openmp"] = true;
#else
    out["openmp"] = false;
#endif
    out["build_type"] = RLCORE_BUILD_TYPE;
    out["isa"] = rlcore::cpu::isa_name();
    return out;
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
    m.doc() = "Native kernels of rlcore over raw memory. Use the functions of rlcore.ops, which check their tensors.";
    m.def("features", &features, "Compiler, C++ standard (17), OpenMP (bool) and build type of this module.");
    bind_policy_loss(m);
    bind_prefix_attention(m);
    bind_segments(m);
    m.def("vocab_head_statistics", &vocab_head_statistics, py::call_guard<py::gil_scoped_release>(),
          "Row pass 1 over a float32 chunk of logits; see csrc/cpu/vocab_head.h. Row stride in elements.");
    m.def("vocab_head_gradient", &vocab_head_gradient, py::call_guard<py::gil_scoped_release>(),
          "Row pass 2 over a float32 chunk of logits, in place; see csrc/cpu/vocab_head.h.");
}
