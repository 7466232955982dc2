// Row passes of the vocabulary head.
//
// The maths: with m = max_v z_v and rest = sum over all v but one with z_v = m of exp(z_v - m),
//     log_sum = log1p(rest)      logp = (z_y - m) - log_sum      H = log_sum - sum_v e_v (z_v - m) / (1 + rest)
// in one sweep: m is a running maximum, and rest and the weighted sum are rescaled where it rises. Leaving the maximum
// out keeps every digit of log_sum where one token has nearly all of the probability. The second sweep makes
//     d a_v = (d_logp (1[v = y] - p_v) - d_entropy p_v (log p_v + H)) * scale / temperature * (1 - tanh^2)
// with 1 - p_y as -expm1(log p_y).
//
// Memory traffic: statistics read the chunk once; the gradient reads it once and writes it once. A row whose
// coefficients are 0 is written without being read.
//
// Launch: statistics have a block per row, of 512 threads with four 16-byte loads in flight each (two of 16-bit
// logits): 32 KiB per block, and two blocks or more per processor, above the 20 to 30 KiB per processor that it takes
// to cover the latency of HBM3 at its bandwidth. The gradient has no sum over a row, so a row is cut into slices of
// 16,384 columns, a block each: chunks of few rows fill the GPU too. Of fewer bits than the logits it takes the front
// of each row's own memory, which other slices would still have to read: there a block has a whole row.
//
// A thread's columns follow from the column numbers alone, not from where a row lies in memory: the same row gives the
// same bits in any chunk. Rows that do not begin at a multiple of 16 bytes are loaded by elements in the same order.
#include "cuda/vocab_head.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "cuda/device.h"

namespace rlcore::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTogether = 16;  // logits of a thread between two looks at the maximum
constexpr int kSlice = 16384;

// exp(-104) is 0 in float32; the bound keeps 0 * -inf out of the entropy.
constexpr float kLogZero = -104.0f;
constexpr float kLog2e = 1.44269504088896341f;

template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

RLCORE_DEVICE float exponential(float x) { return exp2f(x * kLog2e); }

// NaN stays.
RLCORE_DEVICE float at_least_log_zero(float x) { return x < kLogZero ? kLogZero : x; }

// z = factor * a, or with a softcap z = outer * tanh(inner * a).
struct Bend {
    float factor;  // scale / temperature
    float inner;   // scale / cap
    float outer;   // cap / temperature
};

RLCORE_DEVICE float number_of(const Number& x, std::int64_t row) {
    return x.rows == nullptr ? x.value : x.rows[row * x.stride];
}

template <bool kCapped>
RLCORE_DEVICE Bend bend_of(const Logits& c, std::int64_t row) {
    const float temperature = number_of(c.temperature, row);
    const float scale = number_of(c.scale, 0);
    const float cap = kCapped ? number_of(c.cap, 0) : 1.0f;
    return {scale / temperature, scale / cap, cap / temperature};
}

template <bool kCapped>
RLCORE_DEVICE float bent(float a, const Bend& b) {
    return kCapped ? __fmul_rn(tanhf(a * b.inner), b.outer) : __fmul_rn(a, b.factor);
}

template <typename T>
RLCORE_DEVICE bool is_aligned(const T* p, std::size_t bytes) {
    return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
}

template <typename T, int n>
struct alignas(sizeof(T) * n) Packed {
    T x[n];
};

// A row of raw logits, or a slice of one, and what is added to it.
template <typename T>
struct Row {
    const T* data;
    const float* bias;  // or null
    bool aligned;       // to 16 bytes
};

template <typename T>
RLCORE_DEVICE Row<T> row_of(const Logits& c, std::int64_t r, int start) {
    const T* data = static_cast<const T*>(c.data) + r * c.row_stride + start;
    return {data, c.bias == nullptr ? nullptr : c.bias + start, is_aligned(data, 16)};
}

template <typename T>
RLCORE_DEVICE float load_one(const Row<T>& row, std::int64_t i) {
    return to_float(row.data[i]) + (row.bias == nullptr ? 0.0f : row.bias[i]);
}

template <typename T>
using Vector = Packed<T, kVector<T>>;

// Vector number v of a row as it lies in memory: one load of 16 bytes where the row is aligned.
template <bool kAligned, typename T>
RLCORE_DEVICE Vector<T> load_vector(const Row<T>& row, int v) {
    const T* from = row.data + v * kVector<T>;
    Vector<T> values;
    if (kAligned) {
        const uint4 raw = *reinterpret_cast<const uint4*>(from);
        memcpy(&values, &raw, sizeof(values));
    } else {
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) values.x[i] = from[i];
    }
    return values;
}

// The raw logits of a vector.
template <typename T>
RLCORE_DEVICE void widen(const Row<T>& row, int v, const Vector<T>& values, float* x) {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) x[i] = to_float(values.x[i]);
    if (row.bias == nullptr) return;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) x[i] += row.bias[v * kVector<T> + i];
}

template <bool kCapped, typename T>
RLCORE_DEVICE void bend_vector(const Row<T>& row, int v, const Vector<T>& values, const Bend& bend, float* z) {
    widen(row, v, values, z);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) z[i] = bent<kCapped>(z[i], bend);
}

template <bool kAligned, typename T, int n>
RLCORE_DEVICE void store_vector(T* to, const float (&x)[n]) {
    Packed<T, n> values;
#pragma unroll
    for (int i = 0; i < n; ++i) from_float(x[i], values.x[i]);
    if (kAligned) {
        *reinterpret_cast<Packed<T, n>*>(to) = values;
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i) to[i] = values.x[i];
    }
}

// What one sweep carries: the logits so far have this maximum; sums leave one logit that is the maximum out.
struct Running {
    float maximum;
    float rest;      // of e = exp(z - maximum)
    float weighted;  // of e * (z - maximum)
};

// Sums of logits below `to` that were taken below a lower maximum, whose own logit now counts with the rest.
RLCORE_DEVICE Running raised(const Running& run, float to) {
    const float down = at_least_log_zero(run.maximum - to);
    const float factor = exponential(down);
    const float all = run.rest + 1.0f;
    return {to, factor * all, factor * (run.weighted + all * down)};
}

template <int n>
RLCORE_DEVICE void add(Running& run, const float (&z)[n]) {
    float top = z[0];
#pragma unroll
    for (int i = 1; i < n; ++i) top = fmaxf(top, z[i]);
    bool left_out = true;
    if (top > run.maximum) {
        run = raised(run, top);
        left_out = false;
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const bool counts = left_out || z[i] != top;
        left_out = left_out || z[i] == top;
        const float below = at_least_log_zero(z[i] - run.maximum);
        const float e = counts ? exponential(below) : 0.0f;
        run.rest += e;
        run.weighted += e * below;
    }
}

// The same in both orders, to the bit.
RLCORE_DEVICE Running merged(const Running& a, const Running& b) {
    if (a.maximum == b.maximum) return {a.maximum, a.rest + b.rest + 1.0f, a.weighted + b.weighted};
    const bool first = a.maximum > b.maximum;
    const Running low = {first ? b.maximum : a.maximum, first ? b.rest : a.rest, first ? b.weighted : a.weighted};
    const float maximum = first ? a.maximum : b.maximum;
    const Running up = raised(low, maximum);
    return {maximum, up.rest + (first ? a.rest : b.rest), up.weighted + (first ? a.weighted : b.weighted)};
}

RLCORE_DEVICE Running merged_over_warp(Running run) {
    for (int step = kWarp / 2; step > 0; step /= 2) {
        const Running other = {__shfl_xor_sync(kAllLanes, run.maximum, step),
                               __shfl_xor_sync(kAllLanes, run.rest, step),
                               __shfl_xor_sync(kAllLanes, run.weighted, step)};
        run = merged(run, other);
    }
    return run;
}

// A thread's share of a row.
template <bool kCapped, bool kAligned, typename T>
RLCORE_DEVICE Running swept(const Row<T>& row, int columns, const Bend& bend) {
    constexpr int kUnroll = kTogether / kVector<T>;
    const int vectors = columns / kVector<T>;
    // No logit is this low, but an infinite one: what the sums hold before the first logit is multiplied by 0.
    Running run = {-FLT_MAX, 0.0f, 0.0f};
    int v = thread_of_block();
    for (; v + (kUnroll - 1) * kThreads < vectors; v += kUnroll * kThreads) {
        // All loads come before the first use of any: the maximum waits for the last of them.
        Vector<T> values[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) values[u] = load_vector<kAligned>(row, v + u * kThreads);
        float z[kTogether];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
            bend_vector<kCapped>(row, v + u * kThreads, values[u], bend, z + u * kVector<T>);
        add(run, z);
    }
    for (; v < vectors; v += kThreads) {
        float z[kVector<T>];
        bend_vector<kCapped>(row, v, load_vector<kAligned>(row, v), bend, z);
        add(run, z);
    }
    const int last = vectors * kVector<T> + thread_of_block();
    if (last < columns) {
        const float z[1] = {bent<kCapped>(load_one(row, last), bend)};
        add(run, z);
    }
    return run;
}

struct StatisticsShared {
    Running warps[kWarps];
};

template <typename T, bool kCapped>
__global__ void __launch_bounds__(kThreads, 2) statistics_kernel(Logits c, Statistics out) {
    RLCORE_SHARED(StatisticsShared, shared);
    const std::int64_t r = blockIdx.x;
    const Row<T> row = row_of<T>(c, r, 0);
    const int columns = static_cast<int>(c.columns);
    const Bend bend = bend_of<kCapped>(c, r);
    Running run = row.aligned ? swept<kCapped, true>(row, columns, bend) : swept<kCapped, false>(row, columns, bend);
    run = merged_over_warp(run);
    if (lane_of_warp() == 0) shared.warps[warp_of_block()] = run;
    __syncthreads();
    if (thread_of_block() != 0) return;
    for (int w = 1; w < kWarps; ++w) run = merged(run, shared.warps[w]);
    // A row of -inf, or with +inf in it, has no distribution.
    if (!(run.maximum > -FLT_MAX && run.maximum <= FLT_MAX)) run.rest = NAN;
    const float log_sum = log1pf(run.rest);
    const std::int64_t y = c.target[r];
    const float z = y >= 0 && y < c.columns ? bent<kCapped>(load_one(row, y), bend) : NAN;
    out.maximum[r] = run.maximum;
    out.log_sum[r] = log_sum;
    out.logp[r] = (z - run.maximum) - log_sum;
    if (out.entropy != nullptr) out.entropy[r] = log_sum - run.weighted / (1.0f + run.rest);
}

// The numbers of a row's gradient.
struct RowGradient {
    float maximum, log_sum, entropy, d_logp, d_entropy;
    Bend bend;
};

// d loss / d a at a column, from the raw logit a.
template <bool kCapped>
RLCORE_DEVICE float gradient_at(float a, bool is_label, const RowGradient& g) {
    const float t = kCapped ? tanhf(a * g.bend.inner) : 0.0f;
    const float z = kCapped ? __fmul_rn(t, g.bend.outer) : __fmul_rn(a, g.bend.factor);
    const float log_p = at_least_log_zero((z - g.maximum) - g.log_sum);
    const float p = exponential(log_p);
    const float toward = is_label ? -expm1f(log_p) : -p;
    const float d = (g.d_logp * toward - g.d_entropy * p * (log_p + g.entropy)) * g.bend.factor;
    return kCapped ? d * (1.0f - __fmul_rn(t, t)) : d;
}

// The gradient of one vector of raw logits.
template <bool kCapped, bool kAligned, typename T, typename U>
RLCORE_DEVICE void write_vector(const Row<T>& row, U* to, int v, const Vector<T>& values, int label,
                                const RowGradient& g) {
    float x[kVector<T>];
    widen(row, v, values, x);
    const int at = label - v * kVector<T>;
    float y = 0.0f;
    if (at >= 0 && at < kVector<T>) {  // one thread of the row, one time
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) y = i == at ? x[i] : y;
        y = gradient_at<kCapped>(y, true, g);
    }
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) x[i] = i == at ? y : gradient_at<kCapped>(x[i], false, g);
    store_vector<kAligned>(to + v * kVector<T>, x);
}

template <bool kCapped, bool kAligned, typename T, typename U>
RLCORE_DEVICE void write_gradient(const Row<T>& row, U* to, int columns, int label, const RowGradient& g) {
    const int vectors = columns / kVector<T>;
    int v = thread_of_block();
    for (; v + kThreads < vectors; v += 2 * kThreads) {
        const Vector<T> first = load_vector<kAligned>(row, v);
        const Vector<T> second = load_vector<kAligned>(row, v + kThreads);
        write_vector<kCapped, kAligned>(row, to, v, first, label, g);
        write_vector<kCapped, kAligned>(row, to, v + kThreads, second, label, g);
    }
    if (v < vectors) write_vector<kCapped, kAligned>(row, to, v, load_vector<kAligned>(row, v), label, g);
    const int last = vectors * kVector<T> + thread_of_block();
    if (last < columns) from_float(gradient_at<kCapped>(load_one(row, last), last == label, g), to[last]);
}

// The same where `to` may be the front of the row's own memory, by all threads of a block: what a turn of the loop
// writes lies before what later ones read, and a barrier stands between its own loads and stores.
template <bool kCapped, bool kAligned, typename T, typename U>
RLCORE_DEVICE void write_narrower(const Row<T>& row, U* to, int columns, int label, const RowGradient& g) {
    const int vectors = columns / kVector<T>;
    for (int base = 0; base < vectors; base += 2 * kThreads) {
        const int v = base + thread_of_block();
        const int w = v + kThreads;
        Vector<T> first = {};
        Vector<T> second = {};
        if (v < vectors) first = load_vector<kAligned>(row, v);
        if (w < vectors) second = load_vector<kAligned>(row, w);
        __syncthreads();
        if (v < vectors) write_vector<kCapped, kAligned>(row, to, v, first, label, g);
        if (w < vectors) write_vector<kCapped, kAligned>(row, to, w, second, label, g);
    }
    const int last = vectors * kVector<T> + thread_of_block();
    const float a = last < columns ? load_one(row, last) : 0.0f;
    __syncthreads();
    if (last < columns) from_float(gradient_at<kCapped>(a, last == label, g), to[last]);
}

template <bool kAligned, int kEach, typename U>
RLCORE_DEVICE void write_zeros(U* to, int columns) {
    const float zeros[kEach] = {};
    const int vectors = columns / kEach;
    for (int v = thread_of_block(); v < vectors; v += kThreads) store_vector<kAligned>(to + v * kEach, zeros);
    const int last = vectors * kEach + thread_of_block();
    if (last < columns) from_float(0.0f, to[last]);
}

template <typename T, typename U, bool kCapped>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_kernel(Logits c, Statistics s, Coefficients d, Output out, int slices) {
    constexpr bool kNarrows = sizeof(U) < sizeof(T);
    const std::int64_t r = blockIdx.x / static_cast<unsigned>(slices);
    const int start = static_cast<int>(blockIdx.x % static_cast<unsigned>(slices)) * kSlice;
    const int left = static_cast<int>(c.columns) - start;
    const int columns = kNarrows || left < kSlice ? left : kSlice;
    const Row<T> row = row_of<T>(c, r, start);
    U* to = static_cast<U*>(out.data) + r * out.row_stride + start;
    const bool aligned = row.aligned && is_aligned(to, kVector<T> * sizeof(U));

    const float d_logp = d.logp[r];
    const float d_entropy = d.entropy == nullptr ? 0.0f : d.entropy[r];
    if (d_logp == 0.0f && d_entropy == 0.0f) {
        if (aligned) {
            write_zeros<true, kVector<T>>(to, columns);
        } else {
            write_zeros<false, kVector<T>>(to, columns);
        }
        return;
    }
    const Bend bend = bend_of<kCapped>(c, r);
    const std::int64_t y = c.target[r];
    const int label = y >= 0 && y < c.columns ? static_cast<int>(y) - start : -1;  // in this slice, or outside of it
    const float entropy = d.entropy == nullptr ? 0.0f : s.entropy[r];
    const RowGradient g = {s.maximum[r], s.log_sum[r], entropy, s.logp[r] != s.logp[r] ? NAN : d_logp, d_entropy, bend};
    if constexpr (kNarrows) {
        if (aligned) {
            write_narrower<kCapped, true>(row, to, columns, label, g);
        } else {
            write_narrower<kCapped, false>(row, to, columns, label, g);
        }
    } else if (aligned) {
        write_gradient<kCapped, true>(row, to, columns, label, g);
    } else {
        write_gradient<kCapped, false>(row, to, columns, label, g);
    }
}

template <typename T>
int launch_statistics(const Logits& c, const Statistics& out, void* stream) {
    if (c.capped) {
        RLCORE_LAUNCH((statistics_kernel<T, true>), c.rows, kThreads, stream, c, out);
    } else {
        RLCORE_LAUNCH((statistics_kernel<T, false>), c.rows, kThreads, stream, c, out);
    }
    return static_cast<int>(cudaGetLastError());
}

template <typename T, typename U>
int launch_gradient(const Logits& c, const Statistics& s, const Coefficients& d, const Output& out, void* stream) {
    const int slices = sizeof(U) < sizeof(T) ? 1 : static_cast<int>((c.columns + kSlice - 1) / kSlice);
    if (c.capped) {
        RLCORE_LAUNCH((gradient_kernel<T, U, true>), c.rows * slices, kThreads, stream, c, s, d, out, slices);
    } else {
        RLCORE_LAUNCH((gradient_kernel<T, U, false>), c.rows * slices, kThreads, stream, c, s, d, out, slices);
    }
    return static_cast<int>(cudaGetLastError());
}

}  // namespace

int statistics(const Logits& c, const Statistics& out, void* stream) {
    if (c.rows == 0) return static_cast<int>(cudaSuccess);
    if (c.type == Type::bfloat16) return launch_statistics<Bfloat16>(c, out, stream);
    if (c.type == Type::float16) return launch_statistics<Half>(c, out, stream);
    return launch_statistics<float>(c, out, stream);
}

int gradient(const Logits& c, const Statistics& s, const Coefficients& d, const Output& out, void* stream) {
    if (c.rows == 0) return static_cast<int>(cudaSuccess);
    if (c.type == Type::bfloat16 && out.type == c.type)
        return launch_gradient<Bfloat16, Bfloat16>(c, s, d, out, stream);
    if (c.type == Type::float16 && out.type == c.type) return launch_gradient<Half, Half>(c, s, d, out, stream);
    if (c.type != Type::float32) return -1;
    if (out.type == Type::bfloat16) return launch_gradient<float, Bfloat16>(c, s, d, out, stream);
    if (out.type == Type::float16) return launch_gradient<float, Half>(c, s, d, out, stream);
    return launch_gradient<float, float>(c, s, d, out, stream);
}

}  // namespace rlcore::cuda
