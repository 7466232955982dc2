#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>

namespace rlcore::cpu {
namespace {

Isa best() {
#if defined(RLCORE_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        return Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::baseline;
}

Isa chosen() {
    const Isa most = best();
    const char* wanted = std::getenv("RLCORE_ISA");
    if (wanted == nullptr) return most;
    if (std::strcmp(wanted, "baseline") == 0) return Isa::baseline;
    if (std::strcmp(wanted, "avx2") == 0 && most == Isa::avx512) return Isa::avx2;
    return most;
}

}  // namespace

Isa isa() {
    static const Isa value = chosen();
    return value;
}

const char* isa_name() {
    switch (isa()) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        default:
            return "baseline";
    }
}

}  // namespace rlcore::cpu
