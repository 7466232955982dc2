// Python module rlcore._cuda: raw device pointers and a stream as integers, sizes and strides in elements. Nothing here
// reads device memory or waits for it. The caller keeps the memory alive until the stream has passed.
//
// tests/emulated.py compiles the same file over emulate/cuda.h: there the pointers are to host memory.
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "cuda/launch.h"
#include "cuda/vocab_head.h"

namespace py = pybind11;

namespace {

using rlcore::cuda::Type;

void check(int error) {
    if (error < 0) throw std::invalid_argument("dtypes: no kernel for these");
    if (error != 0) throw std::runtime_error(cudaGetErrorString(static_cast<cudaError_t>(error)));
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
    m.def("vocab_head_statistics", &vocab_head_statistics, "Row pass 1; see csrc/cuda/vocab_head.h.");
    m.def("vocab_head_gradient", &vocab_head_gradient, "Row pass 2; see csrc/cuda/vocab_head.h.");
}
