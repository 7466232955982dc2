// What the kernels share: launches, 16-bit floats, reductions over a warp and a block in one fixed order.
//
// A source that includes this compiles with nvcc and, under emulate/cuda.h, as plain C++.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Whatever the kernel wants of shared memory, as one struct without constructors.
#define RLCORE_SHARED(type, name) __shared__ type name
#define RLCORE_LAUNCH(kernel, blocks, threads, stream, ...) \
    kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#define RLCORE_SHARED(type, name) type& name = emulate::shared<type>()
#define RLCORE_LAUNCH(kernel, blocks, threads, stream, ...) \
    (static_cast<void>(stream), emulate::launch(kernel, blocks, threads, __VA_ARGS__))
#endif

#define RLCORE_DEVICE static __device__ __forceinline__

namespace rlcore::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// 16-bit floats as they lie in memory.
struct Bfloat16 {
    std::uint16_t bits;
};
struct Half {
    std::uint16_t bits;
};

RLCORE_DEVICE float to_float(float x) { return x; }
RLCORE_DEVICE float to_float(Bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

#if defined(__CUDACC__)
RLCORE_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
RLCORE_DEVICE void from_float(float x, Half& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }
RLCORE_DEVICE void from_float(float x, Bfloat16& y) { y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
#else
RLCORE_DEVICE float to_float(Half x) {
    _Float16 h;
    std::memcpy(&h, &x, sizeof(h));
    return static_cast<float>(h);
}
RLCORE_DEVICE void from_float(float x, Half& y) {
    const _Float16 h = static_cast<_Float16>(x);
    std::memcpy(&y, &h, sizeof(h));
}
RLCORE_DEVICE void from_float(float x, Bfloat16& y) {
    std::uint32_t u;
    std::memcpy(&u, &x, sizeof(u));
    const std::uint32_t nearest = u + 0x7fff + (u >> 16 & 1);
    y.bits = static_cast<std::uint16_t>(x != x ? 0x7fff : nearest >> 16);
}
#endif
RLCORE_DEVICE void from_float(float x, float& y) { y = x; }

RLCORE_DEVICE int thread_of_block() { return static_cast<int>(threadIdx.x); }
RLCORE_DEVICE int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }
RLCORE_DEVICE int warp_of_block() { return static_cast<int>(threadIdx.x) / kWarp; }

// Every lane gets the sum: the same additions in the same order in each.
template <typename T>
RLCORE_DEVICE T warp_sum(T x) {
    for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}

// The sum over a block of kWarps warps, in all its threads; `scratch` may be used again after another barrier.
template <int kWarps, typename T>
RLCORE_DEVICE T block_sum(T x, T (&scratch)[kWarps]) {
    x = warp_sum(x);
    if (lane_of_warp() == 0) scratch[warp_of_block()] = x;
    __syncthreads();
    T total = scratch[0];
    for (int w = 1; w < kWarps; ++w) total += scratch[w];
    return total;
}

}  // namespace rlcore::cuda
