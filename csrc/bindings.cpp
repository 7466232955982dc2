// Python module rlcore._native: raw data pointers as integers, sizes and strides in elements, no copies.
// The caller keeps the memory alive and sees to it that every offset lies inside the values.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/segments.h"
#include "cpu/vocab_head.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address, const char* name, bool may_be_null) {
    if (address == 0 && !may_be_null) throw std::invalid_argument(std::string(name) + ": null pointer");
    if (address % alignof(T) != 0) {
        throw std::invalid_argument(std::string(name) + ": address is not a multiple of " + std::to_string(alignof(T)));
    }
    return reinterpret_cast<T*>(address);
}

void check_offsets(const std::int64_t* offsets, std::int64_t segments) {
    if (offsets[0] < 0) {
        throw std::invalid_argument("offsets: expected a first value >= 0, got " + std::to_string(offsets[0]));
    }
    for (std::int64_t s = 0; s < segments; ++s) {
        if (offsets[s + 1] < offsets[s]) {
            throw std::invalid_argument("offsets: must not decrease, got " + std::to_string(offsets[s]) + " and then " +
                                        std::to_string(offsets[s + 1]) + " at segment " + std::to_string(s));
        }
    }
}

template <typename T>
void segment_sum_of(std::uintptr_t values_ptr, std::int64_t stride, const std::int64_t* offsets, std::int64_t segments,
                    std::uintptr_t out_ptr) {
    const bool no_values = offsets[segments] == offsets[0];
    const T* values = pointer<const T>(values_ptr, "values_ptr", no_values);
    rlcore::cpu::segment_sum(values, stride, offsets, segments, pointer<T>(out_ptr, "out_ptr", segments == 0));
}

void segment_sum(std::uintptr_t values_ptr, std::int64_t stride, std::uintptr_t offsets_ptr, std::int64_t segments,
                 std::uintptr_t out_ptr, const std::string& dtype) {
    if (segments < 0) {
        throw std::invalid_argument("n_segments: expected a number >= 0, got " + std::to_string(segments));
    }
    if (stride < 0) throw std::invalid_argument("stride: expected a number >= 0, got " + std::to_string(stride));
    const auto* offsets = pointer<const std::int64_t>(offsets_ptr, "offsets_ptr", false);
    check_offsets(offsets, segments);
    if (dtype == "float32") {
        segment_sum_of<float>(values_ptr, stride, offsets, segments, out_ptr);
    } else if (dtype == "float64") {
        segment_sum_of<double>(values_ptr, stride, offsets, segments, out_ptr);
    } else {
        throw std::invalid_argument("dtype: expected 'float32' or 'float64', got '" + dtype + "'");
    }
}

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
        throw std::invalid_argument("logits: expected rows >= 0, columns >= 1 and a row stride of at least the columns");
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
    RLCORE_CALL(gradient, chunk, statistics_of(maximum, log_sum, maximum, entropy, rows), d, indices, kept, raw, threads);
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
    m.def("segment_sum", &segment_sum, py::arg("values_ptr"), py::arg("stride"), py::arg("offsets_ptr"),
          py::arg("n_segments"), py::arg("out_ptr"), py::arg("dtype"), py::call_guard<py::gil_scoped_release>(),
          "out[s] = sum of values[offsets[s]:offsets[s + 1]], each segment in one fixed order; ValueError for bad "
          "arguments. Strides in elements; offsets are int64, n_segments + 1 of them; dtype 'float32' or 'float64'.");
    m.def("vocab_head_statistics", &vocab_head_statistics, py::call_guard<py::gil_scoped_release>(),
          "Row pass 1 over a float32 chunk of logits; see csrc/cpu/vocab_head.h. Row stride in elements.");
    m.def("vocab_head_gradient", &vocab_head_gradient, py::call_guard<py::gil_scoped_release>(),
          "Row pass 2 over a float32 chunk of logits, in place; see csrc/cpu/vocab_head.h.");
}
