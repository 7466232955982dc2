// The entry points of libgomp that the compiler calls for our pragmas, over std::thread; for RLCORE_SANITIZE=thread.
//
// libgomp synchronizes by futexes that ThreadSanitizer does not see: every loop would be reported as a race with the
// code before and after it, and suppressing that would hide true races with it. Here a team starts and ends by threads
// that the sanitizer follows, and nothing orders its members among themselves. Dynamic loops are dealt out in turn: who
// takes which chunk is free there, and this way it is shared out, and the same in every run, whatever the machine does.
//
// Hidden symbols: torch brings a libgomp into the global scope of the process, which would win. tests/sanitizers.py
// refuses a module that still takes something from libgomp, which is how a new kind of pragma makes itself known.
#include <cstdlib>
#include <thread>
#include <vector>

#pragma GCC visibility push(hidden)

namespace {

// A member of a team, and its next chunk of the dynamic loop.
struct Member {
    unsigned rank = 0;
    unsigned size = 1;
    bool looped = false;
    long next = 0;
    long end = 0;
    long chunk = 0;

    void begin(long start, long behind, long step, long steps) {
        if (looped || step <= 0) std::abort();  // one rising loop per team is all that we have
        looped = true;
        next = start + static_cast<long>(rank) * step * steps;
        end = behind;
        chunk = step * steps;
    }
};

thread_local Member member;

template <typename Begin>
void run(unsigned threads, void (*body)(void*), void* data, const Begin& begin) {
    const unsigned size = threads == 0 ? 4 : threads;  // 0: a pragma without num_threads
    const auto work = [=, &begin](unsigned rank) {
        const Member before = member;
        member = Member();
        member.rank = rank;
        member.size = size;
        begin();
        body(data);
        member = before;
    };
    std::vector<std::thread> others;
    for (unsigned rank = 1; rank < size; ++rank) others.emplace_back(work, rank);
    work(0);
    for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" {

int omp_get_num_threads() { return static_cast<int>(member.size); }

int omp_get_thread_num() { return static_cast<int>(member.rank); }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    run(threads, body, data, [] {});
}

// GCC begins a dynamic loop with its team, or inside where the bounds are worked out there.
void GOMP_parallel_loop_nonmonotonic_dynamic(void (*body)(void*), void* data, unsigned threads, long start, long end,
                                             long step, long steps, unsigned) {
    run(threads, body, data, [=] { member.begin(start, end, step, steps); });
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* start, long* end) {
    if (member.next >= member.end) return false;
    *start = member.next;
    *end = member.next + member.chunk < member.end ? member.next + member.chunk : member.end;
    member.next += static_cast<long>(member.size) * member.chunk;
    return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long first, long behind, long step, long steps, long* start, long* end) {
    member.begin(first, behind, step, steps);
    return GOMP_loop_nonmonotonic_dynamic_next(start, end);
}

void GOMP_loop_end_nowait() {}

}  // extern "C"

#pragma GCC visibility pop
