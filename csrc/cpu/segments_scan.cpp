#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "cpu/segments.h"
#include "cpu/team.h"

namespace rlcore::cpu {
namespace {

// Rows of a thread, at least: 17 microseconds of gae (AMD EPYC; two threads are faster from 2^15 rows on).
constexpr std::int64_t kRowsPerThread = 1 << 14;

// A recurrence waits for its last multiplication and addition; several sequences side by side hide that.
constexpr int kSideBySide = 4;

// Sequences [first, last) from their ends to their beginnings. Row has a State, begin(sequence) and step(row, state).
template <typename Row>
void walk(const std::int64_t* offsets, std::int64_t first, std::int64_t last, const Row& row) {
    typename Row::State state[kSideBySide];
    std::int64_t at[kSideBySide];    // row to be done next
    std::int64_t left[kSideBySide];  // rows to be done
    std::int64_t next = first;
    const auto fill = [&](int lane) {
        while (next < last && offsets[next + 1] == offsets[next]) ++next;
        if (next >= last) return false;
        state[lane] = row.begin(next);
        at[lane] = offsets[next + 1] - 1;
        left[lane] = offsets[next + 1] - offsets[next];
        ++next;
        return true;
    };
    int busy = 0;
    while (busy < kSideBySide && fill(busy)) ++busy;
    while (busy == kSideBySide) {
        const std::int64_t together = *std::min_element(left, left + kSideBySide);
        typename Row::State s[kSideBySide];
        for (int lane = 0; lane < kSideBySide; ++lane) s[lane] = state[lane];
        for (std::int64_t k = 0; k < together; ++k) {
            for (int lane = 0; lane < kSideBySide; ++lane) row.step(at[lane] - k, s[lane]);
        }
        for (int lane = 0; lane < kSideBySide; ++lane) {
            state[lane] = s[lane];
            at[lane] -= together;
            left[lane] -= together;
        }
        for (int lane = 0; lane < busy;) {
            if (left[lane] > 0 || fill(lane)) {
                ++lane;
            } else {
                --busy;
                state[lane] = state[busy];
                at[lane] = at[busy];
                left[lane] = left[busy];
            }
        }
    }
    for (int lane = 0; lane < busy; ++lane) {
        typename Row::State s = state[lane];
        for (std::int64_t k = 0; k < left[lane]; ++k) row.step(at[lane] - k, s);
    }
}

template <typename Row>
void walk_all(const std::int64_t* offsets, std::int64_t count, int threads, const Row& row) {
    const std::int64_t total = count > 0 ? offsets[count] - offsets[0] : 0;
    threads = team(total, kRowsPerThread, threads);
    if (threads == 1) {
        walk(offsets, 0, count, row);
        return;
    }
    // Parts of about equal numbers of rows; a sequence belongs to the part in which it begins.
    const std::int64_t parts = 4 * static_cast<std::int64_t>(threads);
    const auto border = [&](std::int64_t p) {
        if (p == parts) return count;
        return static_cast<std::int64_t>(std::lower_bound(offsets, offsets + count, offsets[0] + total * p / parts) -
                                         offsets);
    };
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::int64_t p = 0; p < parts; ++p) walk(offsets, border(p), border(p + 1), row);
}

// A row's mask as all bits or none. Selecting by bits keeps the compiler from branching: on a mask with holes a branch
// is mispredicted at every third row, which took longer than all of the arithmetic.
typedef double Pair __attribute__((vector_size(16)));
typedef std::int64_t Bits __attribute__((vector_size(16)));

constexpr Bits kRowBits[2] = {{0, 0}, {-1, -1}};

template <bool kMasked>
struct Keep {
    Bits bits;

    Keep(const std::uint8_t* mask, std::int64_t i) : bits(kRowBits[kMasked ? mask[i] != 0 : 1]) {}

    Pair choose(Pair yes, Pair no) const {
        if (!kMasked) return yes;
        return reinterpret_cast<Pair>((reinterpret_cast<Bits>(yes) & bits) | (reinterpret_cast<Bits>(no) & ~bits));
    }

    double choose(double yes, double no) const { return choose(Pair{yes, 0.0}, Pair{no, 0.0})[0]; }
};

template <typename T>
double end_value(const Time<T>& time, std::int64_t sequence) {
    return time.bootstrap == nullptr ? 0.0 : static_cast<double>(time.bootstrap[sequence]);
}

template <typename T, bool kMasked>
struct ScanRow {
    struct State {
        double y;
    };
    const Time<T>& time;
    const T* delta;
    PerRow<T> decay;
    T* out;

    State begin(std::int64_t sequence) const { return {end_value(time, sequence)}; }

    void step(std::int64_t i, State& s) const {
        const double found = static_cast<double>(delta[i]) + decay.at(i) * s.y;
        const Keep<kMasked> keep(time.mask, i);
        s.y = keep.choose(found, s.y);
        out[i] = static_cast<T>(keep.choose(found, 0.0));
    }
};

// kPlain: gamma and lam are one number each.
template <typename T, bool kMasked, bool kPlain>
struct GaeRow {
    struct State {
        double advantage;
        double following;  // value of the next row
    };
    const Time<T>& time;
    const T* reward;
    const T* value;
    PerRow<T> gamma;
    PerRow<T> lam;
    double gamma_lam;
    T* advantage;
    T* returns;

    State begin(std::int64_t sequence) const { return {0.0, end_value(time, sequence)}; }

    void step(std::int64_t i, State& s) const {
        const double v = static_cast<double>(value[i]);
        const double discount = kPlain ? gamma.number : gamma.at(i);
        const double decay = kPlain ? gamma_lam : discount * lam.at(i);
        const double delta = static_cast<double>(reward[i]) + discount * s.following - v;
        const double found = delta + decay * s.advantage;
        const Keep<kMasked> keep(time.mask, i);
        const Pair state = keep.choose(Pair{found, v}, Pair{s.advantage, s.following});
        s.advantage = state[0];
        s.following = state[1];
        const Pair out = keep.choose(Pair{found, found + v}, Pair{0.0, 0.0});
        advantage[i] = static_cast<T>(out[0]);
        returns[i] = static_cast<T>(out[1]);
    }
};

template <typename T>
struct VtraceRow {
    struct State {
        double scan;       // returns - value of the next row
        double following;  // value of the next row
        double target;     // returns of the next row
    };
    const Time<T>& time;
    const T* reward;
    const T* value;
    const T* log_ratio;
    PerRow<T> gamma;
    PerRow<T> lam;
    double rho_bar;
    double c_bar;
    T* advantage;
    T* returns;

    State begin(std::int64_t sequence) const {
        const double end = end_value(time, sequence);
        return {0.0, end, end};
    }

    void step(std::int64_t i, State& s) const {
        if (time.mask != nullptr && time.mask[i] == 0) {
            advantage[i] = 0;
            returns[i] = 0;
            return;
        }
        const double v = static_cast<double>(value[i]);
        const double r = static_cast<double>(reward[i]);
        const double ratio = std::exp(static_cast<double>(log_ratio[i]));
        const double rho = ratio > rho_bar ? rho_bar : ratio;
        const double c = ratio > c_bar ? c_bar : ratio;
        const double discount = gamma.at(i);
        s.scan = rho * (r + discount * s.following - v) + discount * lam.at(i) * c * s.scan;
        advantage[i] = static_cast<T>(rho * (r + discount * s.target - v));
        s.target = v + s.scan;
        s.following = v;
        returns[i] = static_cast<T>(s.target);
    }
};

template <typename T, bool kMasked>
void gae_of(const Time<T>& time, const T* reward, const T* value, const PerRow<T>& gamma, const PerRow<T>& lam,
            T* advantage, T* returns) {
    const double decay = gamma.number * lam.number;
    if (gamma.rows == nullptr && lam.rows == nullptr) {
        const GaeRow<T, kMasked, true> row = {time, reward, value, gamma, lam, decay, advantage, returns};
        walk_all(time.offsets, time.count, time.threads, row);
    } else {
        const GaeRow<T, kMasked, false> row = {time, reward, value, gamma, lam, decay, advantage, returns};
        walk_all(time.offsets, time.count, time.threads, row);
    }
}

}  // namespace

template <typename T>
void reverse_scan(const Time<T>& time, const T* delta, const PerRow<T>& decay, T* y) {
    if (time.mask == nullptr) {
        walk_all(time.offsets, time.count, time.threads, ScanRow<T, false>{time, delta, decay, y});
    } else {
        walk_all(time.offsets, time.count, time.threads, ScanRow<T, true>{time, delta, decay, y});
    }
}

template <typename T>
void gae(const Time<T>& time, const T* reward, const T* value, const PerRow<T>& gamma, const PerRow<T>& lam,
         T* advantage, T* returns) {
    if (time.mask == nullptr) {
        gae_of<T, false>(time, reward, value, gamma, lam, advantage, returns);
    } else {
        gae_of<T, true>(time, reward, value, gamma, lam, advantage, returns);
    }
}

template <typename T>
void vtrace(const Time<T>& time, const T* reward, const T* value, const T* log_ratio, const PerRow<T>& gamma,
            const PerRow<T>& lam, double rho_bar, double c_bar, T* advantage, T* returns) {
    const VtraceRow<T> row = {time, reward, value, log_ratio, gamma, lam, rho_bar, c_bar, advantage, returns};
    walk_all(time.offsets, time.count, time.threads, row);
}

void linear_scan(const double* delta, const double* decay, const std::uint8_t* last, std::int64_t n, double* y,
                 int threads) {
    std::vector<std::int64_t> offsets = {0};
    for (std::int64_t i = 0; i < n; ++i) {
        if (last[i] != 0 || i + 1 == n) offsets.push_back(i + 1);
    }
    const auto count = static_cast<std::int64_t>(offsets.size()) - 1;
    reverse_scan<double>({offsets.data(), count, nullptr, nullptr, threads}, delta, {decay, 0.0}, y);
}

#define RLCORE_SCANS(T)                                                                                               \
    template void reverse_scan<T>(const Time<T>&, const T*, const PerRow<T>&, T*);                                    \
    template void gae<T>(const Time<T>&, const T*, const T*, const PerRow<T>&, const PerRow<T>&, T*, T*);             \
    template void vtrace<T>(const Time<T>&, const T*, const T*, const T*, const PerRow<T>&, const PerRow<T>&, double, \
                            double, T*, T*);
RLCORE_SCANS(float)
RLCORE_SCANS(double)

}  // namespace rlcore::cpu
