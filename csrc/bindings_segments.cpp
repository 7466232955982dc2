#include "cpu/segments.h"

#include <string>
#include <type_traits>

#include "bindings.h"

namespace py = pybind11;

namespace {

using rlcore::cpu::Center;
using rlcore::cpu::PerRow;
using rlcore::cpu::Reduce;
using rlcore::cpu::Scale;
using rlcore::cpu::Segments;
using rlcore::cpu::Time;
using Address = std::uintptr_t;

void expect(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

// Calls fn with a null pointer of the type that `dtype` names.
template <typename Fn>
void with_type(const std::string& dtype, Fn fn) {
    if (dtype == "float32") {
        fn(static_cast<float*>(nullptr));
    } else if (dtype == "float64") {
        fn(static_cast<double*>(nullptr));
    } else {
        throw std::invalid_argument("dtype: expected 'float32' or 'float64', got '" + dtype + "'");
    }
}

template <typename T>
void segment_sum_of(Address values_ptr, std::int64_t stride, const std::int64_t* offsets, std::int64_t segments,
                    Address out_ptr) {
    const bool no_values = offsets[segments] == offsets[0];
    const T* values = pointer<const T>(values_ptr, "values_ptr", no_values);
    rlcore::cpu::segment_sum(values, stride, offsets, segments, pointer<T>(out_ptr, "out_ptr", segments == 0));
}

void segment_sum(Address values_ptr, std::int64_t stride, Address offsets_ptr, std::int64_t segments, Address out_ptr,
                 const std::string& dtype) {
    expect(segments >= 0, "n_segments: expected a number >= 0, got " + std::to_string(segments));
    expect(stride >= 0, "stride: expected a number >= 0, got " + std::to_string(stride));
    const auto* offsets = pointer<const std::int64_t>(offsets_ptr, "offsets_ptr", false);
    check_offsets(offsets, segments);
    with_type(dtype, [=](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        segment_sum_of<T>(values_ptr, stride, offsets, segments, out_ptr);
    });
}

void check_border(const std::int64_t* offsets, std::int64_t count, std::int64_t rows) {
    check_offsets(offsets, count);
    expect(offsets[0] == 0 && offsets[count] == rows, "offsets: expected to rise from 0 to the number of rows");
}

Segments segments_of(Address offsets_ptr, Address ids_ptr, Address mask_ptr, std::int64_t rows, std::int64_t count) {
    expect(rows >= 0 && count >= 0, "rows, count: expected numbers >= 0");
    const bool by_ids = offsets_ptr == 0;
    const Segments s = {pointer<const std::int64_t>(offsets_ptr, "offsets", true),
                        pointer<const std::int64_t>(ids_ptr, "ids", !by_ids || rows == 0),
                        pointer<const std::uint8_t>(mask_ptr, "mask", true), rows, count};
    if (!by_ids) {
        check_border(s.offsets, count, rows);
        return s;
    }
    for (std::int64_t i = 0; i < rows; ++i) {
        expect(!s.keeps(i) || (s.ids[i] >= 0 && s.ids[i] < count), "ids: expected ids from 0 to count - 1");
    }
    return s;
}

Reduce reduction_of(const std::string& name) {
    if (name == "sum") return Reduce::sum;
    if (name == "mean") return Reduce::mean;
    if (name == "std") return Reduce::deviation;
    if (name == "min") return Reduce::minimum;
    expect(name == "max", "what: expected 'sum', 'mean', 'std', 'min' or 'max', got '" + name + "'");
    return Reduce::maximum;
}

void segment_reduce(const std::string& what, Address x, Address offsets, Address ids, Address mask, std::int64_t rows,
                    std::int64_t count, std::int64_t ddof, Address out, const std::string& dtype, int threads) {
    const Segments s = segments_of(offsets, ids, mask, rows, count);
    const Reduce reduction = reduction_of(what);
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        rlcore::cpu::segment_reduce<T>(reduction, pointer<const T>(x, "x", rows == 0), s, ddof,
                                       pointer<T>(out, "out", count == 0), threads);
    });
}

void segment_count(Address offsets, Address ids, Address mask, std::int64_t rows, std::int64_t count, Address out,
                   int threads) {
    const Segments s = segments_of(offsets, ids, mask, rows, count);
    rlcore::cpu::segment_count(s, pointer<std::int64_t>(out, "out", count == 0), threads);
}

void segment_rank(Address x, Address offsets, Address ids, Address mask, std::int64_t rows, std::int64_t count,
                  Address out, const std::string& dtype, int threads) {
    const Segments s = segments_of(offsets, ids, mask, rows, count);
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        rlcore::cpu::segment_rank<T>(pointer<const T>(x, "x", rows == 0), s,
                                     pointer<std::int64_t>(out, "out", rows == 0), threads);
    });
}

void segment_topk(Address x, Address offsets, Address ids, Address mask, std::int64_t rows, std::int64_t count,
                  std::int64_t k, Address values, Address places, const std::string& dtype, int threads) {
    expect(k >= 1, "k: expected a number >= 1");
    const Segments s = segments_of(offsets, ids, mask, rows, count);
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        rlcore::cpu::segment_topk<T>(pointer<const T>(x, "x", rows == 0), s, k,
                                     pointer<T>(values, "values", count == 0),
                                     pointer<std::int64_t>(places, "rows", count == 0), threads);
    });
}

Center center_of(const std::string& name) {
    if (name == "none") return Center::none;
    if (name == "group") return Center::group;
    if (name == "leave_one_out") return Center::leave_one_out;
    expect(name == "batch", "center: expected none, group, leave_one_out or batch");
    return Center::batch;
}

Scale scale_of(const std::string& name) {
    if (name == "none") return Scale::none;
    if (name == "group") return Scale::group;
    expect(name == "batch", "scale: expected none, group or batch");
    return Scale::batch;
}

void group_advantage(Address reward, Address group, Address weight, Address mask, std::int64_t n,
                     const std::string& center, const std::string& scale, bool spread_of_residual, double ddof,
                     double eps, Address out) {
    expect(n >= 0, "n: expected a number >= 0");
    const rlcore::cpu::Advantage rule = {center_of(center), scale_of(scale), spread_of_residual, ddof, eps};
    const bool grouped =
        rule.center == Center::group || rule.center == Center::leave_one_out || rule.scale == Scale::group;
    const auto* ids = grouped ? pointer<const std::int64_t>(group, "group", n == 0) : nullptr;
    rlcore::cpu::group_advantage(
        pointer<const double>(reward, "reward", n == 0), ids, pointer<const double>(weight, "weight", true),
        pointer<const std::uint8_t>(mask, "mask", true), n, rule, pointer<double>(out, "out", n == 0));
}

// An address of one number per row, or 0 and the number.
template <typename T>
PerRow<T> per_row(Address rows, double number, const char* name) {
    return {pointer<const T>(rows, name, true), number};
}

template <typename T>
Time<T> time_of(Address offsets, std::int64_t count, std::int64_t rows, Address mask, Address bootstrap, int threads) {
    expect(rows >= 0 && count >= 0 && threads >= 1, "rows, count, threads: expected numbers >= 0, threads >= 1");
    const Time<T> time = {pointer<const std::int64_t>(offsets, "offsets", false), count,
                          pointer<const std::uint8_t>(mask, "mask", true),
                          pointer<const T>(bootstrap, "bootstrap", true), threads};
    check_border(time.offsets, count, rows);
    return time;
}

void reverse_scan(Address delta, Address decay_rows, double decay, Address offsets, std::int64_t count,
                  std::int64_t rows, Address mask, Address bootstrap, Address out, const std::string& dtype,
                  int threads) {
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        rlcore::cpu::reverse_scan<T>(time_of<T>(offsets, count, rows, mask, bootstrap, threads),
                                     pointer<const T>(delta, "delta", rows == 0),
                                     per_row<T>(decay_rows, decay, "decay"), pointer<T>(out, "out", rows == 0));
    });
}

void gae(Address reward, Address value, Address gamma_rows, double gamma, Address lam_rows, double lam, Address offsets,
         std::int64_t count, std::int64_t rows, Address mask, Address bootstrap, Address advantage, Address returns,
         const std::string& dtype, int threads) {
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const bool none = rows == 0;
        rlcore::cpu::gae<T>(time_of<T>(offsets, count, rows, mask, bootstrap, threads),
                            pointer<const T>(reward, "reward", none), pointer<const T>(value, "value", none),
                            per_row<T>(gamma_rows, gamma, "gamma"), per_row<T>(lam_rows, lam, "lam"),
                            pointer<T>(advantage, "advantage", none), pointer<T>(returns, "returns", none));
    });
}

void vtrace(Address reward, Address value, Address log_ratio, Address gamma_rows, double gamma, Address lam_rows,
            double lam, double rho_bar, double c_bar, Address offsets, std::int64_t count, std::int64_t rows,
            Address mask, Address bootstrap, Address advantage, Address returns, const std::string& dtype,
            int threads) {
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const bool none = rows == 0;
        rlcore::cpu::vtrace<T>(time_of<T>(offsets, count, rows, mask, bootstrap, threads),
                               pointer<const T>(reward, "reward", none), pointer<const T>(value, "value", none),
                               pointer<const T>(log_ratio, "log_ratio", none), per_row<T>(gamma_rows, gamma, "gamma"),
                               per_row<T>(lam_rows, lam, "lam"), rho_bar, c_bar,
                               pointer<T>(advantage, "advantage", none), pointer<T>(returns, "returns", none));
    });
}

void linear_scan(Address delta, Address decay, Address last, std::int64_t n, Address out, int threads) {
    expect(n >= 0 && threads >= 1, "n, threads: expected n >= 0, threads >= 1");
    rlcore::cpu::linear_scan(
        pointer<const double>(delta, "delta", n == 0), pointer<const double>(decay, "decay", n == 0),
        pointer<const std::uint8_t>(last, "last", n == 0), n, pointer<double>(out, "out", n == 0), threads);
}

}  // namespace

void check_offsets(const std::int64_t* offsets, std::int64_t segments) {
    expect(offsets[0] >= 0, "offsets: expected a first value >= 0, got " + std::to_string(offsets[0]));
    for (std::int64_t s = 0; s < segments; ++s) {
        if (offsets[s + 1] < offsets[s]) {
            throw std::invalid_argument("offsets: must not decrease, got " + std::to_string(offsets[s]) + " and then " +
                                        std::to_string(offsets[s + 1]) + " at segment " + std::to_string(s));
        }
    }
}

void bind_segments(py::module_& m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.def("segment_sum", &segment_sum, py::arg("values_ptr"), py::arg("stride"), py::arg("offsets_ptr"),
          py::arg("n_segments"), py::arg("out_ptr"), py::arg("dtype"), release(),
          "out[s] = sum of values[offsets[s]:offsets[s + 1]], each segment in one fixed order; ValueError for bad "
          "arguments. Strides in elements; offsets are int64, n_segments + 1 of them; dtype 'float32' or 'float64'.");
    m.def("segment_reduce", &segment_reduce, release(),
          "sum, mean, std, min or max of each segment; csrc/cpu/segments.h.");
    m.def("segment_count", &segment_count, release(), "Unmasked rows of each segment, int64.");
    m.def("segment_rank", &segment_rank, release(), "Place of each row in its segment by falling value, int64.");
    m.def("segment_topk", &segment_topk, release(), "The k largest values of each segment and their rows.");
    m.def("group_advantage", &group_advantage, release(), "Scoped centre and scale of float64 rewards.");
    m.def("reverse_scan", &reverse_scan, release(), "y[i] = delta[i] + decay[i] * y[i + 1] inside each sequence.");
    m.def("gae", &gae, release(), "Advantages and returns of generalized advantage estimation.");
    m.def("vtrace", &vtrace, release(), "Advantages and value targets of V-trace.");
    m.def("linear_scan", &linear_scan, release(), "The recurrence over float64 rows, cut after rows that are last.");
}
