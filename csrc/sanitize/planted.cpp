// Faults that a sanitizer must report, compiled with the flags of the module: `planted bounds|overflow|race-static|
// race-dynamic`; `planted clean` is the same without a fault, and names the instruction set that the module would take.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/simd.h"

namespace {

using rlcore::cpu::RLCORE_ISA::kLanes;

// A vector load whose last lane lies behind the array.
float bounds(std::int64_t missing) {
    std::vector<float> x(static_cast<std::size_t>(kLanes - missing), 1.0f);
    return rlcore::cpu::RLCORE_ISA::largest(rlcore::cpu::RLCORE_ISA::load(x.data()));
}

int overflow(int by) {
    volatile int most = std::numeric_limits<int>::max();
    return most + by;
}

// Every iteration writes its own element where `stride` is 1, and one accumulator where it is 0.
std::int64_t fill_static(std::int64_t stride) {
    std::vector<std::int64_t> x(1000);
    std::int64_t* out = x.data();
#pragma omp parallel for schedule(static) num_threads(2)
    for (std::int64_t i = 0; i < 1000; ++i) out[i * stride] += i;
    return x[0] + x[999];
}

std::int64_t fill_dynamic(std::int64_t stride) {
    std::vector<std::int64_t> x(1000);
    std::int64_t* out = x.data();
#pragma omp parallel for schedule(dynamic, 3) num_threads(4)
    for (std::int64_t i = 0; i < 1000; ++i) out[i * stride] += i;
    return x[0] + x[999];
}

}  // namespace

int main(int count, char** arguments) {
    const char* fault = count == 2 ? arguments[1] : "";
    const auto is = [fault](const char* name) { return std::strcmp(fault, name) == 0; };
    const float loaded = bounds(is("bounds") ? 1 : 0);
    const int added = overflow(is("overflow") ? 1 : 0);
    const bool whole = fill_static(is("race-static") ? 0 : 1) == 999 && fill_dynamic(is("race-dynamic") ? 0 : 1) == 999;
    std::printf("%g %d %s\n%s\n", static_cast<double>(loaded), added, whole ? "whole" : "torn",
                rlcore::cpu::isa_name());
    return is("clean") && !whole ? 1 : 0;
}
