#include "cpu/vocab_head.h"

#include <math.h>

#include "cpu/simd.h"
#include "cpu/team.h"

namespace rlcore::cpu::RLCORE_ISA {
namespace {

// 16 KiB of a row: the exponentials of a block read from the first-level cache what its maximum has brought there.
constexpr std::int64_t kBlock = 4096;

// Logits of a thread, at least: 12 microseconds of the statistics, 9 of the gradient.
constexpr std::int64_t kLogitsPerThread = 1 << 15;

// Below -104 an exponential is 0 in float32; the bound keeps 0 * -inf out of the entropy.
constexpr float kLogZero = -104.0f;

struct Row {
    float factor;  // z = factor * a without a softcap
    float inner;   // scale / cap
    float outer;   // cap / temperature
    bool capped;
    bool bent;  // pass 1 writes
};

Row row_of(const Logits& c, std::int64_t row) {
    const float temperature = c.temperature[row * c.temperature_stride];
    Row r;
    r.capped = c.cap > 0.0f;
    r.factor = c.scale / temperature;
    r.inner = r.capped ? c.scale / c.cap : 0.0f;
    r.outer = r.capped ? c.cap / temperature : 1.0f;
    r.bent = r.capped || r.factor != 1.0f;
    return r;
}

RLCORE_INLINE Floats bend(Floats a, const Row& row) { return row.capped ? tanh_of(a * row.inner) : a * row.factor; }

// The slope of the softcap, from t = tanh.
RLCORE_INLINE Floats slope_of(Floats t) { return 1.0f - rounded(t * t); }

struct Running {
    float maximum;
    double sum;       // of exp(z - maximum)
    double weighted;  // of exp(z - maximum) * (z - maximum)
};

// One block of a row, bent in place; merged into the row's running sums.
template <bool kEntropy>
RLCORE_INLINE void add_block(float* x, std::int64_t n, const Row& row, Running& run) {
    const float lowest = -__builtin_inff();
    const std::int64_t whole = n / kLanes * kLanes;
    Floats top = broadcast(lowest);
    for (std::int64_t i = 0; i < whole; i += kLanes) {
        Floats z = load(x + i);
        if (row.bent) {
            z = bend(z, row);
            store(x + i, z);
        }
        top = select(z > top, z, top);
    }
    if (whole < n) {
        Floats z = load_part(x + whole, n - whole, lowest);
        if (row.bent) {
            z = bend(z, row);
            store_part(x + whole, z, n - whole);
            for (std::int64_t i = n - whole; i < kLanes; ++i) z[i] = lowest;
        }
        top = select(z > top, z, top);
    }
    const float found = largest(rounded(top * row.outer));
    if (found > run.maximum) {
        if (run.sum > 0.0) {
            const double down = static_cast<double>(run.maximum) - static_cast<double>(found);
            const double factor = exp(down);
            run.weighted = factor * (run.weighted + run.sum * down);
            run.sum *= factor;
        }
        run.maximum = found;
    }
    Floats total = Floats{};
    Floats weighted = Floats{};
    for (std::int64_t i = 0; i < n; i += kLanes) {
        Floats z = i < whole ? load(x + i) : load_part(x + i, n - i, lowest);
        if (row.capped) z = rounded(z * row.outer);
        const Floats below = larger(z - run.maximum, broadcast(kLogZero));
        const Floats e = exp_of(below);
        total += e;
        if (kEntropy) weighted += e * below;
    }
    run.sum += sum(total);
    if (kEntropy) run.weighted += sum(weighted);
}

template <bool kEntropy>
void statistics_of_row(const Logits& c, const Statistics& out, std::int64_t r) {
    const Row row = row_of(c, r);
    float* x = c.data + r * c.row_stride;
    Running run = {-__builtin_inff(), 0.0, 0.0};
    for (std::int64_t start = 0; start < c.columns; start += kBlock) {
        const std::int64_t n = c.columns - start < kBlock ? c.columns - start : kBlock;
        add_block<kEntropy>(x + start, n, row, run);
    }
    const double log_sum = log(run.sum);
    const std::int64_t y = c.target[r];
    out.maximum[r] = run.maximum;
    out.log_sum[r] = static_cast<float>(log_sum);
    const bool valid = y >= 0 && y < c.columns;
    // (z - maximum) - log_sum is exact where p -> 1; z - lse has lost eps * |lse|.
    const float z = valid ? rounded(broadcast(x[y]) * row.outer)[0] : __builtin_nanf("");
    out.logp[r] = (z - run.maximum) - static_cast<float>(log_sum);
    if (kEntropy) out.entropy[r] = static_cast<float>(log_sum - run.weighted / run.sum);
}

struct RowGradient {
    float shift;  // maximum, then log_sum: log p = (z - maximum) - log_sum
    float log_sum;
    float d_logp;
    float d_entropy;
    float entropy;
    float slope;  // scale / temperature: dz/da without the softcap's 1 - tanh^2
};

// d loss / d z -> d loss / d a. Every product is rounded, so that the target's -p d + d is 0 where p = 1.
RLCORE_INLINE Floats chained(Floats d, Floats bent, const Row& row, const RowGradient& g) {
    d = rounded(rounded(d) * g.slope);
    return row.capped ? rounded(d * slope_of(bent)) : d;
}

template <bool kEntropy>
RLCORE_INLINE Floats gradient_of(Floats x, const Row& row, const RowGradient& g, bool raw) {
    if (raw) x = bend(x, row);
    const Floats z = row.capped ? rounded(x * row.outer) : x;
    const Floats log_p = larger((z - g.shift) - g.log_sum, broadcast(kLogZero));
    const Floats p = exp_of(log_p);
    const Floats d = kEntropy ? -p * (g.d_logp + g.d_entropy * (log_p + g.entropy)) : -p * g.d_logp;
    return chained(d, x, row, g);
}

// Columns [start, stop) of source row `from`, written to row `to`.
template <bool kEntropy>
void gradient_of_slice(const Logits& c, const Statistics& s, const Coefficients& d, std::int64_t from, std::int64_t to,
                       std::int64_t start, std::int64_t stop, bool raw) {
    const Row row = row_of(c, from);
    const float temperature = c.temperature[from * c.temperature_stride];
    const RowGradient g = {s.maximum[from],
                           s.log_sum[from],
                           d.logp[from],
                           kEntropy ? d.entropy[from] : 0.0f,
                           kEntropy ? s.entropy[from] : 0.0f,
                           c.scale / temperature};
    const float* x = c.data + from * c.row_stride;
    float* y = c.data + to * c.row_stride;
    const std::int64_t label = c.target[from];
    const bool here = label >= start && label < stop;
    const float at_label = here ? x[label] : 0.0f;
    std::int64_t i = start;
    for (; i + kLanes <= stop; i += kLanes) store(y + i, gradient_of<kEntropy>(load(x + i), row, g, raw));
    if (i < stop) {
        store_part(y + i, gradient_of<kEntropy>(load_part(x + i, stop - i, 0.0f), row, g, raw), stop - i);
    }
    if (here) {
        const Floats bent = raw ? bend(broadcast(at_label), row) : broadcast(at_label);
        y[label] += chained(broadcast(g.d_logp), bent, row, g)[0];
    }
}

template <bool kEntropy>
void gradient_with(const Logits& c, const Statistics& s, const Coefficients& d, const std::int64_t* keep,
                   std::int64_t kept, bool raw, int threads) {
    threads = team(kept * c.columns, kLogitsPerThread, threads);
    (void)threads;  // read by the pragma alone
    if (keep == nullptr) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (std::int64_t r = 0; r < kept; ++r) gradient_of_slice<kEntropy>(c, s, d, r, r, 0, c.columns, raw);
        return;
    }
    // Rows move over one another, so a thread owns columns and walks the rows upwards: row keep[i] >= i is read before
    // it is written, by the same thread.
    const std::int64_t slices = (c.columns + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t slice = 0; slice < slices; ++slice) {
        const std::int64_t start = slice * kBlock;
        const std::int64_t stop = start + kBlock < c.columns ? start + kBlock : c.columns;
        for (std::int64_t i = 0; i < kept; ++i) gradient_of_slice<kEntropy>(c, s, d, keep[i], i, start, stop, raw);
    }
}

}  // namespace

void statistics(const Logits& c, const Statistics& out, int threads) {
    threads = team(c.rows * c.columns, kLogitsPerThread, threads);
    (void)threads;  // read by the pragma alone
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t r = 0; r < c.rows; ++r) {
        if (out.entropy != nullptr) {
            statistics_of_row<true>(c, out, r);
        } else {
            statistics_of_row<false>(c, out, r);
        }
    }
}

void gradient(const Logits& c, const Statistics& s, const Coefficients& d, const std::int64_t* keep, std::int64_t kept,
              bool raw, int threads) {
    if (d.entropy != nullptr) {
        gradient_with<true>(c, s, d, keep, kept, raw, threads);
    } else {
        gradient_with<false>(c, s, d, keep, kept, raw, threads);
    }
}

}  // namespace rlcore::cpu::RLCORE_ISA
