// Which instruction set the vector kernels run on: the best that both this build and this CPU have.
#pragma once

namespace rlcore::cpu {

enum class Isa { baseline, avx2, avx512 };

// RLCORE_ISA=baseline|avx2|avx512 in the environment lowers it (read once); more than the CPU has is ignored.
Isa isa();
const char* isa_name();

}  // namespace rlcore::cpu

// Declares a kernel once per instruction set: RLCORE_KERNEL(void f(int)).
#if defined(RLCORE_X86)
#define RLCORE_KERNEL(...)            \
    namespace rlcore::cpu::baseline { \
    __VA_ARGS__;                      \
    }                                 \
    namespace rlcore::cpu::avx2 {     \
    __VA_ARGS__;                      \
    }                                 \
    namespace rlcore::cpu::avx512 {   \
    __VA_ARGS__;                      \
    }
#define RLCORE_CALL(name, ...)                                                                        \
    (::rlcore::cpu::isa() == ::rlcore::cpu::Isa::avx512                                               \
         ? ::rlcore::cpu::avx512::name(__VA_ARGS__)                                                   \
         : (::rlcore::cpu::isa() == ::rlcore::cpu::Isa::avx2 ? ::rlcore::cpu::avx2::name(__VA_ARGS__) \
                                                             : ::rlcore::cpu::baseline::name(__VA_ARGS__)))
#else
#define RLCORE_KERNEL(...)            \
    namespace rlcore::cpu::baseline { \
    __VA_ARGS__;                      \
    }
#define RLCORE_CALL(name, ...) (::rlcore::cpu::baseline::name(__VA_ARGS__))
#endif
