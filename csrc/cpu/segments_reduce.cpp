#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/segments.h"
#include "cpu/team.h"

namespace rlcore::cpu {
namespace {

// Rows of a thread, at least: 8 microseconds of a mean, more of the others (two threads are faster from 2^15 rows on).
constexpr std::int64_t kRowsPerThread = 1 << 14;

std::size_t size_of(std::int64_t n) { return static_cast<std::size_t>(n); }

// Calls fn(row, segment) for all rows that count; the rows of a segment in rising order by one thread. Segments given
// by offsets run in parallel, those given by ids, which may interleave, in one thread.
template <typename Fn>
void each_row(const Segments& s, int threads, Fn fn) {
    if (s.offsets == nullptr) {
        for (std::int64_t i = 0; i < s.rows; ++i) {
            if (s.keeps(i)) fn(i, s.ids[i]);
        }
        return;
    }
    threads = team(s.rows, kRowsPerThread, threads);
    (void)threads;  // read by the pragma alone
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t g = 0; g < s.count; ++g) {
        for (std::int64_t i = s.offsets[g]; i < s.offsets[g + 1]; ++i) {
            if (s.keeps(i)) fn(i, g);
        }
    }
}

template <typename T>
void extremes(bool smallest, const T* x, const Segments& s, T* out, int threads) {
    const T start = smallest ? std::numeric_limits<T>::infinity() : -std::numeric_limits<T>::infinity();
    std::fill(out, out + s.count, start);
    each_row(s, threads, [=](std::int64_t i, std::int64_t g) {
        const bool better = smallest ? x[i] < out[g] : x[i] > out[g];
        if (better || std::isnan(x[i])) out[g] = x[i];
    });
}

// The rows of each segment that count, segment after segment.
struct Members {
    std::vector<std::int64_t> starts;
    std::vector<std::int64_t> rows;
};

Members members_of(const Segments& s) {
    Members m;
    m.starts.assign(size_of(s.count) + 1, 0);
    each_row(s, 1, [&](std::int64_t, std::int64_t g) { ++m.starts[size_of(g) + 1]; });
    for (std::size_t g = 1; g < m.starts.size(); ++g) m.starts[g] += m.starts[g - 1];
    m.rows.resize(size_of(m.starts.back()));
    std::vector<std::int64_t> next(m.starts.begin(), m.starts.end() - 1);
    each_row(s, 1, [&](std::int64_t i, std::int64_t g) { m.rows[size_of(next[size_of(g)]++)] = i; });
    return m;
}

// Sorts every segment's rows by falling value and hands them on: use(segment, place, row).
template <typename T, typename Use>
void by_falling_value(const T* x, const Segments& s, int threads, Use use) {
    threads = team(s.rows, kRowsPerThread, threads);
    (void)threads;  // read by the pragma alone
    Members m = members_of(s);
    const auto above = [x](std::int64_t a, std::int64_t b) {
        return x[a] > x[b] || (std::isnan(x[a]) && !std::isnan(x[b]));
    };
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
    for (std::int64_t g = 0; g < s.count; ++g) {
        const auto begin = m.rows.begin() + m.starts[size_of(g)];
        const auto end = m.rows.begin() + m.starts[size_of(g) + 1];
        std::stable_sort(begin, end, above);
        for (auto row = begin; row != end; ++row) use(g, static_cast<std::int64_t>(row - begin), *row);
    }
}

// Ids as 0 .. count - 1; equal ids get equal numbers.
std::int64_t dense(const std::int64_t* ids, std::int64_t n, std::vector<std::int64_t>& out) {
    out.resize(size_of(n));
    if (n == 0) return 0;
    const auto [low, high] = std::minmax_element(ids, ids + n);
    const auto span = static_cast<std::uint64_t>(*high) - static_cast<std::uint64_t>(*low);
    if (span < static_cast<std::uint64_t>(8 * n + 1024)) {
        for (std::int64_t i = 0; i < n; ++i) out[size_of(i)] = ids[i] - *low;
        return static_cast<std::int64_t>(span) + 1;
    }
    std::vector<std::int64_t> distinct(ids, ids + n);
    std::sort(distinct.begin(), distinct.end());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    for (std::int64_t i = 0; i < n; ++i) {
        out[size_of(i)] = std::lower_bound(distinct.begin(), distinct.end(), ids[i]) - distinct.begin();
    }
    return static_cast<std::int64_t>(distinct.size());
}

// Weighted statistics of rows that share an id (null: all rows are one scope).
class Scope {
  public:
    Scope(const std::int64_t* ids, std::int64_t count, const std::vector<double>& weight)
        : ids_(ids), weight_(weight), total_(size_of(count), 0.0) {
        for (std::size_t i = 0; i < weight.size(); ++i) total_[of(i)] += weight[i];
    }

    std::size_t of(std::size_t row) const { return ids_ == nullptr ? 0 : size_of(ids_[row]); }
    double total(std::size_t group) const { return total_[group]; }

    std::vector<double> mean(const std::vector<double>& x) const {
        std::vector<double> m(total_.size(), 0.0);
        for (std::size_t i = 0; i < x.size(); ++i) m[of(i)] += weight_[i] * x[i];
        for (std::size_t g = 0; g < m.size(); ++g) m[g] /= total_[g] <= 0.0 ? 1.0 : total_[g];
        return m;
    }

    // 1 where it is not defined (total weight <= ddof), so that dividing by it changes nothing.
    std::vector<double> deviation(const std::vector<double>& x, double ddof) const {
        const std::vector<double> m = mean(x);
        std::vector<double> d(total_.size(), 0.0);
        for (std::size_t i = 0; i < x.size(); ++i) {
            const double away = x[i] - m[of(i)];
            d[of(i)] += weight_[i] * (away * away);
        }
        for (std::size_t g = 0; g < d.size(); ++g) {
            const double free = total_[g] - ddof;
            d[g] = free <= 0.0 ? 1.0 : std::sqrt(d[g] / free);
        }
        return d;
    }

  private:
    const std::int64_t* ids_;
    const std::vector<double>& weight_;
    std::vector<double> total_;
};

}  // namespace

void segment_count(const Segments& s, std::int64_t* out, int threads) {
    std::fill(out, out + s.count, 0);
    each_row(s, threads, [out](std::int64_t, std::int64_t g) { ++out[g]; });
}

template <typename T>
void segment_reduce(Reduce what, const T* x, const Segments& s, std::int64_t ddof, T* out, int threads) {
    if (what == Reduce::minimum || what == Reduce::maximum) {
        extremes(what == Reduce::minimum, x, s, out, threads);
        return;
    }
    std::vector<double> sums(size_of(s.count), 0.0);
    std::vector<double> losses(std::is_same_v<T, double> ? size_of(s.count) : 0, 0.0);
    std::vector<std::int64_t> counts(size_of(s.count), 0);
    double* sum = sums.data();
    double* lost = losses.data();
    std::int64_t* n = counts.data();
    each_row(s, threads, [=](std::int64_t i, std::int64_t g) {
        const double value = static_cast<double>(x[i]);
        const double before = sum[g];
        sum[g] = before + value;
        ++n[g];
        if constexpr (std::is_same_v<T, double>) {  // what the addition rounded away
            const double part = sum[g] - before;
            lost[g] += (before - (sum[g] - part)) + (value - part);
        }
    });
    // With an infinity in the data the compensation is inf - inf; the plain sum is the answer.
    for (std::size_t g = 0; g < losses.size(); ++g) sum[g] += std::isfinite(lost[g]) ? lost[g] : 0.0;
    const auto mean = [=](std::int64_t g) { return sum[g] / static_cast<double>(std::max<std::int64_t>(n[g], 1)); };
    if (what != Reduce::deviation) {
        for (std::int64_t g = 0; g < s.count; ++g) out[g] = static_cast<T>(what == Reduce::sum ? sum[g] : mean(g));
        return;
    }
    for (std::int64_t g = 0; g < s.count; ++g) sum[g] = mean(g);
    std::vector<double> squares(size_of(s.count), 0.0);
    double* square = squares.data();
    each_row(s, threads, [=](std::int64_t i, std::int64_t g) {
        const double away = static_cast<double>(x[i]) - sum[g];
        square[g] += away * away;
    });
    for (std::int64_t g = 0; g < s.count; ++g) {
        out[g] = n[g] <= ddof ? T(0) : static_cast<T>(std::sqrt(square[g] / static_cast<double>(n[g] - ddof)));
    }
}

template <typename T>
void segment_rank(const T* x, const Segments& s, std::int64_t* rank, int threads) {
    std::fill(rank, rank + s.rows, -1);
    by_falling_value(x, s, threads, [=](std::int64_t, std::int64_t place, std::int64_t row) { rank[row] = place; });
}

template <typename T>
void segment_topk(const T* x, const Segments& s, std::int64_t k, T* values, std::int64_t* rows, int threads) {
    std::fill(values, values + s.count * k, -std::numeric_limits<T>::infinity());
    std::fill(rows, rows + s.count * k, -1);
    by_falling_value(x, s, threads, [=](std::int64_t g, std::int64_t place, std::int64_t row) {
        if (place >= k) return;
        values[g * k + place] = x[row];
        rows[g * k + place] = row;
    });
}

void group_advantage(const double* reward, const std::int64_t* group, const double* weight, const std::uint8_t* mask,
                     std::int64_t n, const Advantage& rule, double* out) {
    std::vector<double> r(size_of(n));
    std::vector<double> w(size_of(n));
    for (std::size_t i = 0; i < r.size(); ++i) {
        const bool keep = mask == nullptr || mask[i] != 0;
        r[i] = keep ? reward[i] : 0.0;
        w[i] = !keep ? 0.0 : weight == nullptr ? 1.0 : weight[i];
    }
    std::vector<std::int64_t> ids;
    const std::int64_t groups = group == nullptr ? 0 : dense(group, n, ids);
    const Scope batch(nullptr, 1, w);
    const std::vector<double> nothing;
    const Scope by_group(ids.data(), groups, group == nullptr ? nothing : w);

    std::vector<double> residual = r;
    if (rule.center != Center::none) {
        const Scope& scope = rule.center == Center::batch ? batch : by_group;
        const std::vector<double> mean = scope.mean(r);
        for (std::size_t i = 0; i < r.size(); ++i) {
            const std::size_t g = scope.of(i);
            const double others = scope.total(g) - (rule.center == Center::leave_one_out ? w[i] : 0.0);
            // The mean of the others is as far from r as the mean of all, times total / others.
            residual[i] = others <= 0.0 ? 0.0 : (r[i] - mean[g]) * (scope.total(g) / others);
        }
    }
    if (rule.scale != Scale::none) {
        const Scope& scope = rule.scale == Scale::batch ? batch : by_group;
        const std::vector<double> deviation = scope.deviation(rule.spread_of_residual ? residual : r, rule.ddof);
        for (std::size_t i = 0; i < r.size(); ++i) residual[i] /= deviation[scope.of(i)] + rule.eps;
    }
    for (std::size_t i = 0; i < r.size(); ++i) out[i] = mask == nullptr || mask[i] != 0 ? residual[i] : 0.0;
}

#define RLCORE_REDUCTIONS(T)                                                                   \
    template void segment_reduce<T>(Reduce, const T*, const Segments&, std::int64_t, T*, int); \
    template void segment_rank<T>(const T*, const Segments&, std::int64_t*, int);              \
    template void segment_topk<T>(const T*, const Segments&, std::int64_t, T*, std::int64_t*, int);
RLCORE_REDUCTIONS(float)
RLCORE_REDUCTIONS(double)

}  // namespace rlcore::cpu
