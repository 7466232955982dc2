#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "bindings.h"
#include "cpu/prefix_attention.h"

namespace py = pybind11;

namespace {

using rlcore::cpu::Attention;
using rlcore::cpu::Heads;
using rlcore::cpu::Node;
using rlcore::cpu::Tile;
using rlcore::cpu::TileRange;

// A tensor [rows, heads, D] with unit stride along D: (address, row stride, head stride), strides in elements.
using View = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;

struct Problem {
    Attention attention;
    std::int64_t rows;
    std::vector<Tile> tiles;
    std::vector<TileRange> trees;
};

Heads heads_of(const View& view, const char* name, bool none) {
    return {pointer<const float>(std::get<0>(view), name, none), std::get<1>(view), std::get<2>(view)};
}

void expect(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

// Checks that the nodes are runs in depth-first order that cover the rows, and cuts each into tiles. `read` [rows] says
// with 1 whose results anybody reads, 0 for all; a tile in which nobody does is left out.
Problem problem_of(std::uintptr_t node_table, std::int64_t nodes, std::int64_t rows, const View& q, const View& k,
                   const View& v, std::int64_t query_heads, std::int64_t key_heads, std::int64_t size, float scale,
                   std::int64_t window, float softcap, std::uintptr_t sink, std::uintptr_t read) {
    expect(rows >= 0 && rows < INT32_MAX && nodes >= 0, "rows: expected 0 to 2^31 - 2");
    expect(key_heads > 0 && query_heads > 0 && query_heads % key_heads == 0 && size > 0,
           "heads: expected key heads that divide the query heads, and a size of at least 1");
    expect(window >= 0 && softcap >= 0.0f, "window, softcap: expected 0 for none, or more");
    const auto* table = pointer<const Node>(node_table, "node_table", nodes == 0);
    const bool none = rows == 0;
    Problem p = {{{table, nodes, 0},
                  heads_of(q, "q", none),
                  heads_of(k, "k", none),
                  heads_of(v, "v", none),
                  query_heads,
                  key_heads,
                  size,
                  scale,
                  window,
                  softcap,
                  pointer<const float>(sink, "sink", true)},
                 rows,
                 {},
                 {}};
    const auto* mask = pointer<const std::uint8_t>(read, "read", true);
    const std::int64_t lanes = RLCORE_CALL(attention_needs, p.attention, false).lanes;
    const std::int64_t ratio = query_heads / key_heads;
    std::vector<std::int64_t> depth(static_cast<std::size_t>(nodes));
    std::int64_t covered = 0;
    for (std::int64_t n = 0; n < nodes; ++n) {
        const Node& node = table[n];
        expect(node.start == covered && node.stop >= node.start && node.parent >= -1 && node.parent < n,
               "node_table: expected runs that follow one another, each after its parent");
        covered = node.stop;
        const std::int64_t above = node.parent < 0 ? 0 : depth[static_cast<std::size_t>(node.parent)];
        depth[static_cast<std::size_t>(n)] = above + node.stop - node.start;
        if (depth[static_cast<std::size_t>(n)] > p.attention.forest.longest) {
            p.attention.forest.longest = depth[static_cast<std::size_t>(n)];
        }
        const auto tiles = static_cast<std::int64_t>(p.tiles.size());
        if (node.parent < 0) p.trees.push_back({tiles, tiles});
        const std::int64_t queries = (node.stop - node.start) * ratio;
        for (std::int64_t first = 0; first < queries; first += lanes) {
            const std::int64_t last = first + lanes < queries ? first + lanes : queries;
            const std::uint8_t* reads = mask == nullptr ? nullptr : mask + node.start;
            if (reads == nullptr || std::count(reads + first / ratio, reads + (last - 1) / ratio + 1, 1) > 0) {
                p.tiles.push_back({n, first, last});
            }
        }
        p.trees.back().last = static_cast<std::int64_t>(p.tiles.size());
    }
    expect(covered == rows, "node_table: expected runs that cover all rows");
    return p;
}

// Working memory of all threads, on a cache line: whole registers are loaded from it.
struct Scratch {
    std::unique_ptr<float[]> memory;
    float* data;
};

Scratch scratch_of(const Problem& p, bool backward, int threads) {
    expect(threads >= 1, "threads: expected at least 1");
    constexpr std::size_t line = 64;
    const auto each = static_cast<std::size_t>(RLCORE_CALL(attention_needs, p.attention, backward).scratch);
    Scratch s = {std::unique_ptr<float[]>(new float[each * static_cast<std::size_t>(threads) + line / sizeof(float)]),
                 nullptr};
    const std::size_t past = reinterpret_cast<std::uintptr_t>(s.memory.get()) % line;
    s.data = s.memory.get() + (line - past) % line / sizeof(float);
    return s;
}

void forward(std::uintptr_t node_table, std::int64_t nodes, std::int64_t rows, const View& q, const View& k,
             const View& v, std::int64_t query_heads, std::int64_t key_heads, std::int64_t size, float scale,
             std::int64_t window, float softcap, std::uintptr_t sink, std::uintptr_t read, std::uintptr_t o,
             std::uintptr_t lse, int threads) {
    const Problem p =
        problem_of(node_table, nodes, rows, q, k, v, query_heads, key_heads, size, scale, window, softcap, sink, read);
    const auto scratch = scratch_of(p, false, threads);
    RLCORE_CALL(attention_forward, p.attention, p.tiles.data(), static_cast<std::int64_t>(p.tiles.size()), scratch.data,
                pointer<float>(o, "o", rows == 0), pointer<float>(lse, "lse", rows == 0), threads);
}

void backward(std::uintptr_t node_table, std::int64_t nodes, std::int64_t rows, const View& q, const View& k,
              const View& v, std::int64_t query_heads, std::int64_t key_heads, std::int64_t size, float scale,
              std::int64_t window, float softcap, std::uintptr_t read, const View& dout, const View& o,
              std::uintptr_t lse, std::int64_t slices, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dv,
              int threads) {
    expect(slices >= 1, "slices: expected at least 1");
    const Problem p =
        problem_of(node_table, nodes, rows, q, k, v, query_heads, key_heads, size, scale, window, softcap, 0, read);
    const auto scratch = scratch_of(p, true, threads);
    const bool none = rows == 0;
    RLCORE_CALL(attention_backward, p.attention, p.tiles.data(), p.trees.data(),
                static_cast<std::int64_t>(p.trees.size()), slices, rows, heads_of(dout, "dout", none),
                heads_of(o, "o", none), pointer<const float>(lse, "lse", none), scratch.data,
                pointer<float>(dq, "dq", none), pointer<float>(dk, "dk", none), pointer<float>(dv, "dv", none),
                threads);
}

}  // namespace

void bind_prefix_attention(py::module_& m) {
    m.def("prefix_attention_forward", &forward, py::call_guard<py::gil_scoped_release>(),
          "Attention over a packed forest in float32; see csrc/cpu/prefix_attention.h. Strides in elements. "
          "Tiles without a row of `read` leave o and lse as they are.");
    m.def("prefix_attention_backward", &backward, py::call_guard<py::gil_scoped_release>(),
          "dq, dk and dv (dk and dv zeroed by the caller) of prefix_attention_forward. Tiles without a row of `read` "
          "leave dq as it is.");
}
