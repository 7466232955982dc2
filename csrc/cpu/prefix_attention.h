// Attention over a packed prefix forest in float32: every query sees the rows of its own path, and nothing else is
// read.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace rlcore::cpu {

// [rows, heads, D] with unit stride along D; strides in elements.
struct Heads {
    const float* data;
    std::int64_t row_stride;
    std::int64_t head_stride;
};

// The unbranched runs in depth-first order: node k owns rows [start, stop), its subtree ends at `end`, parent < k or
// -1. Together they cover every row once.
struct Node {
    std::int64_t start;
    std::int64_t stop;
    std::int64_t end;
    std::int64_t parent;
};

struct Forest {
    const Node* nodes;
    std::int64_t count;
    std::int64_t longest;  // rows of the longest path
};

// Query head h reads key head h / (query_heads / key_heads). Scores are scale * q . k, then softcap * tanh(. / softcap)
// unless softcap is 0; a query sees the last `window` rows of its path, all of them if window is 0.
struct Attention {
    Forest forest;
    Heads q;
    Heads k;
    Heads v;
    std::int64_t query_heads;
    std::int64_t key_heads;
    std::int64_t size;  // D, of keys and of values
    float scale;
    std::int64_t window;
    float softcap;
    const float* sink;  // [query_heads] or null
};

// Consecutive queries of one run: (row, query head of one key head) pairs, the head fastest, [first, last) of the
// run's.
struct Tile {
    std::int64_t node;
    std::int64_t first;
    std::int64_t last;
};

// Queries per tile, and the floats of working memory that one thread needs.
struct Needs {
    std::int64_t lanes;
    std::int64_t scratch;
};

// The tiles of one tree.
struct TileRange {
    std::int64_t first;
    std::int64_t last;
};

}  // namespace rlcore::cpu

RLCORE_KERNEL(Needs attention_needs(const Attention& a, bool backward))

// o [rows, query_heads, D] and lse [rows, query_heads], contiguous. A (tile, key head) belongs to one thread and is
// computed by itself: the result does not depend on the threads.
RLCORE_KERNEL(void attention_forward(const Attention& a, const Tile* tiles, std::int64_t count, float* scratch,
                                     float* o, float* lse, int threads))

// dq like q; dk and dv [slices, rows, key_heads, D], contiguous and zeroed, to be added over the slices. dout, o [rows,
// query_heads, D]: lse as forward left it. Tile t of a tree adds to slice t % slices; a (tree, key head, slice) belongs
// to one thread, which walks its tiles in order.
RLCORE_KERNEL(void attention_backward(const Attention& a, const Tile* tiles, const TileRange* trees, std::int64_t count,
                                      std::int64_t slices, std::int64_t rows, const Heads& dout, const Heads& o,
                                      const float* lse, float* scratch, float* dq, float* dk, float* dv, int threads))
