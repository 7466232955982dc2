#include "cpu/prefix_attention.h"

#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/product.h"
#include "cpu/simd.h"

namespace rlcore::cpu::RLCORE_ISA {
namespace {

// A tile is as wide as the registers can hold products for (product.h).
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
constexpr std::int64_t kTile = kVectors * kLanes;
// Keys at a time: with AVX-512 their scores (16 KiB), keys and values (8 KiB each at D = 32) stay in the nearest cache.
constexpr std::int64_t kKeys = 64;
// The ranks of a tile's queries span at most kTile, so that under a window too every query sees a key of the first
// block: its maximum is finite from there on, and no -inf meets another.
static_assert(kTile <= kKeys, "a query may see nothing of the first block");

constexpr float kLowest = -__builtin_inff();

RLCORE_INLINE std::int64_t padded(std::int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// ---- a tile and its path ------------------------------------------------------------------------------------------

struct Work {
    std::int32_t* path;  // rows from the root to the tile's last query; those before `begin` are not filled in
    std::int64_t begin;  // no query sees a key before it
    std::int64_t keys;
    std::int32_t rank[kTile];  // place on the path of each query's own row; the last key that it sees
    std::int64_t row[kTile];
    std::int64_t head[kTile];
    std::int64_t lanes;
    std::int64_t vectors;
};

void enter(const Attention& a, const Tile& tile, std::int64_t key_head, Work& w) {
    const Node* nodes = a.forest.nodes;
    const std::int64_t ratio = a.query_heads / a.key_heads;
    const std::int64_t start = nodes[tile.node].start;
    w.lanes = tile.last - tile.first;
    w.vectors = (w.lanes + kLanes - 1) / kLanes;
    std::int64_t above = 0;
    for (std::int64_t k = nodes[tile.node].parent; k >= 0; k = nodes[k].parent) above += nodes[k].stop - nodes[k].start;
    for (std::int64_t i = 0; i < kTile; ++i) {
        const std::int64_t query = tile.first + (i < w.lanes ? i : w.lanes - 1);
        w.row[i] = start + query / ratio;
        w.head[i] = key_head * ratio + query % ratio;
        w.rank[i] = static_cast<std::int32_t>(above + query / ratio);
    }
    w.keys = w.rank[w.lanes - 1] + 1;
    w.begin = a.window > 0 && w.rank[0] >= a.window ? w.rank[0] - a.window + 1 : 0;
    for (std::int64_t i = 0; above + i < w.keys; ++i) w.path[above + i] = static_cast<std::int32_t>(start + i);
    std::int64_t at = above;
    for (std::int64_t k = nodes[tile.node].parent; k >= 0 && at > w.begin; k = nodes[k].parent) {
        for (std::int64_t r = nodes[k].stop; r-- > nodes[k].start && at > w.begin;)
            w.path[--at] = static_cast<std::int32_t>(r);
    }
}

void gather(const Heads& x, const Attention& a, std::int64_t head, const std::int32_t* rows, std::int64_t n,
            float* out) {
    const float* base = x.data + head * x.head_stride;
    for (std::int64_t j = 0; j < n; ++j) {
        const float* from = base + rows[j] * x.row_stride;
        std::int64_t d = 0;
        for (; d + kLanes <= a.size; d += kLanes) store(out + j * a.size + d, load(from + d));
        for (; d < a.size; ++d) out[j * a.size + d] = from[d];
    }
}

// The tile's queries of x, times `factor`, as columns [D, kTile]; the lanes past the last query hold 0.
void columns_of(const Heads& x, const Attention& a, const Work& w, float factor, float* out) {
    const std::int64_t width = w.vectors * kLanes;
    for (std::int64_t i = 0; i < w.lanes; ++i) {
        const float* from = x.data + w.row[i] * x.row_stride + w.head[i] * x.head_stride;
        for (std::int64_t d = 0; d < a.size; ++d) out[d * kTile + i] = from[d] * factor;
    }
    for (std::int64_t d = 0; d < a.size; ++d) {
        for (std::int64_t i = w.lanes; i < width; ++i) out[d * kTile + i] = 0.0f;
    }
}

// The same as rows [lanes, padded(D)].
void rows_of(const Heads& x, const Attention& a, const Work& w, float factor, float* out) {
    const std::int64_t pitch = padded(a.size);
    for (std::int64_t i = 0; i < w.lanes; ++i) {
        const float* from = x.data + w.row[i] * x.row_stride + w.head[i] * x.head_stride;
        for (std::int64_t d = 0; d < a.size; ++d) out[i * pitch + d] = from[d] * factor;
        for (std::int64_t d = a.size; d < pitch; ++d) out[i * pitch + d] = 0.0f;
    }
}

void cap(const Work& w, std::int64_t n, float softcap, float* s) {
    for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t v = 0; v < w.vectors; ++v) {
            float* at = s + j * kTile + v * kLanes;
            store(at, softcap * tanh_of(load(at) / softcap));
        }
    }
}

// Whether every query sees all keys of the block. `first` is the rank of its first key.
bool sees_all(const Work& w, std::int64_t window, std::int64_t first, std::int64_t n) {
    return (window == 0 || first > w.rank[w.lanes - 1] - window) && first + n - 1 <= w.rank[0];
}

// Queries get `fill` at keys that come after them or lie before their window.
void hide(const Work& w, std::int64_t window, std::int64_t first, std::int64_t n, float fill, float* s) {
    const auto reach = static_cast<std::int32_t>(window > 0 && window < w.keys ? window : w.keys);
    for (std::int64_t v = 0; v < w.vectors; ++v) {
        Ints rank;
        std::memcpy(&rank, w.rank + v * kLanes, sizeof(rank));
        for (std::int64_t j = 0; j < n; ++j) {
            float* at = s + j * kTile + v * kLanes;
            const Ints after = rank - static_cast<std::int32_t>(first + j);
            store(at, select((after >= 0) & (after < reach), load(at), broadcast(fill)));
        }
    }
}

struct Running {
    alignas(64) float top[kTile];
    alignas(64) float sum[kTile];
};

// Scores of a block -> exp(score - maximum so far) in place; what was summed before shrinks by the returned factors.
void soften(const Work& w, std::int64_t n, float* s, Running& run, float* factor) {
    for (std::int64_t v = 0; v < w.vectors; ++v) {
        float* at = s + v * kLanes;
        const Floats before = load(run.top + v * kLanes);
        Floats top = before;
        for (std::int64_t j = 0; j < n; ++j) {
            const Floats x = load(at + j * kTile);
            top = select(x > top, x, top);
        }
        Floats sum = Floats{};
        for (std::int64_t j = 0; j < n; ++j) {
            const Floats e = exp_of(load(at + j * kTile) - top);
            store(at + j * kTile, e);
            sum += e;
        }
        const Floats shrink = exp_of(before - top);
        store(factor + v * kLanes, shrink);
        store(run.top + v * kLanes, top);
        store(run.sum + v * kLanes, load(run.sum + v * kLanes) * shrink + sum);
    }
}

void shrink(const Work& w, std::int64_t size, const float* factor, float* ot) {
    for (std::int64_t v = 0; v < w.vectors; ++v) {
        const Floats f = load(factor + v * kLanes);
        for (std::int64_t d = 0; d < size; ++d) {
            float* at = ot + d * kTile + v * kLanes;
            store(at, load(at) * f);
        }
    }
}

void forward_tile(const Attention& a, const Tile& tile, std::int64_t key_head, float* scratch, float* o, float* lse) {
    const std::int64_t D = a.size;
    Work w;
    float* qt = scratch;
    float* ot = qt + D * kTile;
    float* s = ot + D * kTile;
    float* k = s + kKeys * kTile;
    float* v = k + kKeys * D;
    w.path = reinterpret_cast<std::int32_t*>(v + kKeys * D);
    enter(a, tile, key_head, w);
    columns_of(a.q, a, w, a.scale, qt);
    Running run;
    alignas(64) float factor[kTile];
    for (std::int64_t i = 0; i < kTile; ++i) {
        run.top[i] = kLowest;
        run.sum[i] = 0.0f;
    }
    for (std::int64_t first = w.begin; first < w.keys; first += kKeys) {
        const std::int64_t n = w.keys - first < kKeys ? w.keys - first : kKeys;
        gather(a.k, a, key_head, w.path + first, n, k);
        gather(a.v, a, key_head, w.path + first, n, v);
        multiply<false>({k, D, 1, D, qt, kTile, s, kTile}, n, w.vectors);
        if (a.softcap > 0.0f) cap(w, n, a.softcap, s);
        const bool all = sees_all(w, a.window, first, n);
        if (!all) hide(w, a.window, first, n, kLowest, s);
        soften(w, n, s, run, factor);
        const Product update = {v, 1, D, n, s, kTile, ot, kTile};
        if (first != w.begin) shrink(w, D, factor, ot);
        weigh(update, D, w.vectors, all || finite(v, n, D, D), false, first != w.begin);
    }
    for (std::int64_t i = 0; i < w.lanes; ++i) {
        const std::int64_t at = w.row[i] * a.query_heads + w.head[i];
        const double top = static_cast<double>(run.top[i]);
        double total = static_cast<double>(run.sum[i]);
        double result = top + log(total);
        // A sink is a key with value 0: it takes its share of the sum.
        if (a.sink != nullptr) {
            const double sink = static_cast<double>(a.sink[w.head[i]]);
            const double larger_one = sink > result ? sink : result;
            result = larger_one + log(exp(sink - larger_one) + exp(result - larger_one));
            total = exp(result - top);
        }
        lse[at] = static_cast<float>(result);
        const float inverse = static_cast<float>(1.0 / total);
        for (std::int64_t d = 0; d < D; ++d) o[at * D + d] = ot[d * kTile + i] * inverse;
    }
}

// ---- backward -----------------------------------------------------------------------------------------------------

// s = scores z -> p = exp(z - lse); dp -> ds = p (dp - delta), under a softcap times its slope 1 - (z / softcap)^2.
// Lanes past the last query have p = 0.
void differentiate(const Work& w, std::int64_t n, float softcap, const float* lse, const float* delta, float* s,
                   float* dp) {
    for (std::int64_t v = 0; v < w.vectors; ++v) {
        const Floats l = load(lse + v * kLanes);
        const Floats mean = load(delta + v * kLanes);
        for (std::int64_t j = 0; j < n; ++j) {
            const std::int64_t at = j * kTile + v * kLanes;
            const Floats z = load(s + at);
            const Floats p = exp_of(z - l);
            Floats ds = p * (load(dp + at) - mean);
            if (softcap > 0.0f) {
                const Floats t = select(z == kLowest, Floats{}, z / softcap);
                ds *= 1.0f - t * t;
            }
            store(s + at, p);
            store(dp + at, ds);
        }
    }
}

void add_rows(const Attention& a, std::int64_t head, const std::int32_t* rows, std::int64_t n, const float* from,
              float* to) {
    const std::int64_t pitch = padded(a.size);
    for (std::int64_t j = 0; j < n; ++j) {
        float* at = to + (rows[j] * a.key_heads + head) * a.size;
        for (std::int64_t d = 0; d < a.size; ++d) at[d] += from[j * pitch + d];
    }
}

void backward_tile(const Attention& a, const Tile& tile, std::int64_t key_head, const Heads& dout, const Heads& o,
                   const float* lse, float* scratch, float* dq, float* dk, float* dv) {
    const std::int64_t D = a.size;
    const std::int64_t pitch = padded(D);
    Work w;
    float* qt = scratch;
    float* dot = qt + D * kTile;
    float* dqt = dot + D * kTile;
    float* qr = dqt + D * kTile;
    float* dor = qr + kTile * pitch;
    float* s = dor + kTile * pitch;
    float* dp = s + kKeys * kTile;
    float* k = dp + kKeys * kTile;
    float* v = k + kKeys * D;
    float* sums = v + kKeys * D;
    w.path = reinterpret_cast<std::int32_t*>(sums + kKeys * pitch);
    enter(a, tile, key_head, w);
    columns_of(a.q, a, w, a.scale, qt);
    columns_of(dout, a, w, 1.0f, dot);
    rows_of(a.q, a, w, a.scale, qr);
    rows_of(dout, a, w, 1.0f, dor);
    alignas(64) float total[kTile];
    alignas(64) float delta[kTile];
    for (std::int64_t i = 0; i < kTile; ++i) {
        total[i] = i < w.lanes ? lse[w.row[i] * a.query_heads + w.head[i]] : -kLowest;
        delta[i] = 0.0f;
        if (i >= w.lanes) continue;
        const float* x = o.data + w.row[i] * o.row_stride + w.head[i] * o.head_stride;
        for (std::int64_t d = 0; d < D; ++d) delta[i] += x[d] * dor[i * pitch + d];
    }
    const bool tile_clean = finite(qr, w.lanes, pitch, pitch) && finite(dor, w.lanes, pitch, pitch);
    for (std::int64_t first = w.begin; first < w.keys; first += kKeys) {
        const std::int64_t n = w.keys - first < kKeys ? w.keys - first : kKeys;
        const std::int32_t* rows = w.path + first;
        gather(a.k, a, key_head, rows, n, k);
        gather(a.v, a, key_head, rows, n, v);
        multiply<false>({k, D, 1, D, qt, kTile, s, kTile}, n, w.vectors);
        if (a.softcap > 0.0f) cap(w, n, a.softcap, s);
        const bool all = sees_all(w, a.window, first, n);
        if (!all) hide(w, a.window, first, n, kLowest, s);
        multiply<false>({v, D, 1, D, dot, kTile, dp, kTile}, n, w.vectors);
        differentiate(w, n, a.softcap, total, delta, s, dp);
        const std::int64_t width = w.vectors * kLanes;
        const bool clean =
            all || (tile_clean && finite(k, n, D, D) && finite(s, n, width, kTile) && finite(dp, n, width, kTile));
        if (!clean) {
            hide(w, a.window, first, n, 0.0f, s);
            hide(w, a.window, first, n, 0.0f, dp);
        }
        weigh({s, kTile, 1, w.lanes, dor, pitch, sums, pitch}, n, pitch / kLanes, clean, true, false);
        add_rows(a, key_head, rows, n, sums, dv);
        weigh({dp, kTile, 1, w.lanes, qr, pitch, sums, pitch}, n, pitch / kLanes, clean, true, false);
        add_rows(a, key_head, rows, n, sums, dk);
        weigh({k, 1, D, n, dp, kTile, dqt, kTile}, D, w.vectors, clean, false, first != w.begin);
    }
    for (std::int64_t i = 0; i < w.lanes; ++i) {
        float* at = dq + (w.row[i] * a.query_heads + w.head[i]) * D;
        for (std::int64_t d = 0; d < D; ++d) at[d] = dqt[d * kTile + i] * a.scale;
    }
}

}  // namespace

Needs attention_needs(const Attention& a, bool backward) {
    const std::int64_t pitch = padded(a.size);
    const std::int64_t common = kKeys * kTile + 2 * kKeys * a.size + padded(a.forest.longest);
    const std::int64_t own =
        backward ? 3 * a.size * kTile + 2 * kTile * pitch + kKeys * (kTile + pitch) : 2 * a.size * kTile;
    return {kTile, common + own};
}

void attention_forward(const Attention& a, const Tile* tiles, std::int64_t count, float* scratch, float* o, float* lse,
                       int threads) {
    (void)threads;  // read by the pragmas alone
    const std::int64_t size = attention_needs(a, false).scratch;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::int64_t i = 0; i < count * a.key_heads; ++i) {
        forward_tile(a, tiles[i / a.key_heads], i % a.key_heads, scratch + thread_number() * size, o, lse);
    }
}

void attention_backward(const Attention& a, const Tile* tiles, const TileRange* trees, std::int64_t count,
                        std::int64_t slices, std::int64_t rows, const Heads& dout, const Heads& o, const float* lse,
                        float* scratch, float* dq, float* dk, float* dv, int threads) {
    (void)threads;
    const std::int64_t size = attention_needs(a, true).scratch;
    const std::int64_t whole = rows * a.key_heads * a.size;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::int64_t i = 0; i < count * a.key_heads * slices; ++i) {
        const TileRange& tree = trees[i / (a.key_heads * slices)];
        const std::int64_t slice = i % slices;
        for (std::int64_t t = tree.first + slice; t < tree.last; t += slices) {
            backward_tile(a, tiles[t], i / slices % a.key_heads, dout, o, lse, scratch + thread_number() * size, dq,
                          dk + slice * whole, dv + slice * whole);
        }
    }
}

}  // namespace rlcore::cpu::RLCORE_ISA
