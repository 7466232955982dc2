// Enough of CUDA to run a kernel's source on the CPU, compiled as plain C++: what tests/emulated.py builds.
//
// Blocks run one after another, in pseudo-random order; inside a block every thread is a fiber. Fibers change only at
// __syncthreads,
// __syncwarp and shuffles, and go on from there in pseudo-random order, so that most missing barriers give a wrong
// result in some test. Shared memory is filled with NaN before each block. A barrier that not all threads reach is an
// error. Not modelled: memory ordering, threads that run at the same time (a race inside one stretch of code between
// two barriers goes unseen where no read meets it), registers, bank conflicts, the rounding of approximate functions
// (each is the exact one here), contraction into fused multiply-adds, and limits on the size of a launch.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

// Nothing is captured here.
using cudaStream_t = void*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, std::size_t size, cudaStream_t) {
    std::memset(to, byte, size);
    return cudaSuccess;
}

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace emulate {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStack = 1 << 16;
constexpr std::size_t kShared = 48 * 1024;
constexpr std::size_t kSlot = 16;  // bytes of the widest shuffled value

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

inline Index thread_index, block_index, block_size, grid_size;

enum class Waits { no, warp, block, done };

// Where a stack goes on. A jump within the process is a tenth of swapcontext, which asks the system for its signal
// mask; under AddressSanitizer, which does not follow jumps between stacks, it has to be that.
struct Place {
    ucontext_t context;
#if !defined(__SANITIZE_ADDRESS__)
    jmp_buf jump;
    bool jumps = false;
#endif
};

__attribute__((noinline)) inline void change(Place& from, Place& to) {
#if defined(__SANITIZE_ADDRESS__)
    swapcontext(&from.context, &to.context);
#else
    from.jumps = true;
    if (_setjmp(from.jump) != 0) return;
    if (to.jumps) _longjmp(to.jump, 1);
    setcontext(&to.context);
#endif
}

struct Fiber {
    Place place;
    std::unique_ptr<char[]> stack;
    Waits waits;
    bool parity;  // which slots the next shuffle uses: those of the last one may still be read
};

struct Warp {
    unsigned arrived;
    char slots[2][kWarp][kSlot];
};

class Block {
  public:
    // Runs body() once per thread.
    template <typename Body>
    void run(unsigned threads, Body& body) {
        if (threads == 0 || threads % kWarp != 0) throw std::runtime_error("emulated: threads must fill their warps");
        start_ = [](void* p) { (*static_cast<Body*>(p))(); };
        body_ = &body;
        std::memset(shared, 0xff, sizeof(shared));
        fibers_.resize(threads);
        warps_.assign(threads / kWarp, Warp{});
        arrived_ = 0;
        ready_.clear();
        for (unsigned t = 0; t < threads; ++t) prepare(fibers_[t], t);
        unsigned done = 0;
        while (!ready_.empty()) {
            std::swap(ready_[random_() % ready_.size()], ready_.back());
            current_ = ready_.back();
            ready_.pop_back();
            thread_index.x = current_;
            change(main_, fibers_[current_].place);
            done += release(current_) ? 1 : 0;
        }
        if (done != threads) throw std::runtime_error("emulated: not all threads reached a barrier");
    }

    void wait(Waits what) {
        Fiber& fiber = fibers_[current_];
        fiber.waits = what;
        change(fiber.place, main_);
    }

    template <typename T>
    T shuffle(T value, unsigned source) {
        static_assert(sizeof(T) <= kSlot, "shuffled values are at most kSlot bytes");
        const unsigned self = current_;
        auto& slots = warps_[self / kWarp].slots[fibers_[self].parity];
        std::memcpy(slots[self % kWarp], &value, sizeof(T));
        wait(Waits::warp);
        if (source < kWarp) std::memcpy(&value, slots[source], sizeof(T));
        fibers_[self].parity = !fibers_[self].parity;
        return value;
    }

    alignas(16) char shared[kShared];

  private:
    void prepare(Fiber& fiber, unsigned t) {
        if (!fiber.stack) fiber.stack.reset(new char[kStack]);
        fiber.waits = Waits::no;
        fiber.parity = false;
        fiber.place = Place();
        ucontext_t& context = fiber.place.context;
        getcontext(&context);
        context.uc_stack.ss_sp = fiber.stack.get();
        context.uc_stack.ss_size = kStack;
        makecontext(&context, &Block::enter, 0);
        ready_.push_back(t);
    }

    static void enter();

    // Lets the others go where this was the last one; whether the thread has ended.
    bool release(unsigned t) {
        const Waits waits = fibers_[t].waits;
        if (waits == Waits::block && ++arrived_ == fibers_.size()) {
            arrived_ = 0;
            for (unsigned other = 0; other < fibers_.size(); ++other) ready_.push_back(other);
        }
        if (waits == Waits::warp && ++warps_[t / kWarp].arrived == kWarp) {
            warps_[t / kWarp].arrived = 0;
            for (unsigned lane = 0; lane < kWarp; ++lane) ready_.push_back(t / kWarp * kWarp + lane);
        }
        return waits == Waits::done;
    }

    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    std::vector<unsigned> ready_;
    Place main_;
    unsigned current_ = 0;
    std::size_t arrived_ = 0;
    void (*start_)(void*) = nullptr;
    void* body_ = nullptr;
    std::minstd_rand random_;
};

inline Block block;
inline std::minstd_rand block_order;

inline void Block::enter() {
    block.start_(block.body_);
    block.wait(Waits::done);
}

template <typename Kernel, typename... Args>
void launch(Kernel kernel, std::int64_t blocks, unsigned threads, Args... args) {
    grid_size.x = static_cast<unsigned>(blocks);
    block_size.x = threads;
    std::vector<unsigned> order(grid_size.x);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), block_order);
    for (const unsigned b : order) {
        block_index.x = b;
        auto body = [&] { kernel(args...); };
        block.run(threads, body);
    }
}

template <typename T>
T& shared() {
    static_assert(sizeof(T) <= kShared, "too much shared memory for a launch without opting in");
    return *reinterpret_cast<T*>(block.shared);
}

}  // namespace emulate

#define threadIdx emulate::thread_index
#define blockIdx emulate::block_index
#define blockDim emulate::block_size
#define gridDim emulate::grid_size

inline void __syncthreads() { emulate::block.wait(emulate::Waits::block); }
inline void __syncwarp() { emulate::block.wait(emulate::Waits::warp); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulate::block.shuffle(value, static_cast<unsigned>(lane) % emulate::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulate::block.shuffle(value, emulate::thread_index.x % emulate::kWarp ^ static_cast<unsigned>(mask));
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
    return emulate::block.shuffle(value, emulate::thread_index.x % emulate::kWarp - delta);
}

inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* to, unsigned x) {
    const unsigned before = *to;
    *to += x;
    return before;
}
inline float __ldcg(const float* from) { return *from; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __int_as_float(int x) {
    float y;
    std::memcpy(&y, &x, sizeof(y));
    return y;
}
inline float __uint_as_float(unsigned x) { return __int_as_float(static_cast<int>(x)); }
inline unsigned __float_as_uint(float x) {
    unsigned y;
    std::memcpy(&y, &x, sizeof(y));
    return y;
}
