// Ranks as threads of one process: for tests of what they say to each other.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "dist/ranks.h"

namespace hadal::testing {

/// Runs body once a rank, each on a thread with its Ranks, over Gloo and a port of this machine.
/// Returns what each rank's exception said, empty where it had none. `absent` ranks never come.
std::vector<std::string> run_ranks(int64_t count,
                                   const std::function<void(dist::Ranks&)>& body,
                                   std::chrono::milliseconds timeout = std::chrono::seconds(60),
                                   const std::vector<int64_t>& absent = {});

}  // namespace hadal::testing
