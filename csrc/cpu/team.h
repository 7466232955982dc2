// How many threads a kernel starts.
#pragma once

#include <cstdint>

namespace rlcore::cpu {

// As many of `threads` as get `grain` units of work each, at least one.
//
// On a quiet machine a team starts within a microsecond or two. On a busy one a thread that is not running holds up the
// call for the milliseconds until it is scheduled, so a team must be worth more than its start: each thread gets
// 10 to 20 microseconds of work. Grains are measured where they are defined. No result depends on the team.
static inline int team(std::int64_t work, std::int64_t grain, int threads) {
    const std::int64_t most = work / grain;
    return most >= threads ? threads : most > 1 ? static_cast<int>(most) : 1;
}

}  // namespace rlcore::cpu
