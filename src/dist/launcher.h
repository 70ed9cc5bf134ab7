// Starts the ranks of a run on this machine, watches them and starts them again.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace hadal::dist {

/// Exit codes of a rank that the launcher tells apart (apps/command.h).
inline constexpr int kExitStopped = 1, kExitBadInput = 2, kExitRankLost = 4;

struct Launch {
  /// Program and arguments of every rank, asked for at every start.
  std::function<std::vector<std::string>()> command;
  int64_t ranks = 1;
  int64_t restarts = 0;  ///< how often all are started again after one of them has died
};

/// Runs the command once a rank, with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
/// MASTER_PORT and HADAL_LISTENING in its environment, until all have ended: 0 where all ended with
/// 0, else kExitStopped. Standard output and error of rank 0 are this process's own; what the
/// others write to standard error appears with their name before it, their standard output nowhere.
///
/// A rank that dies ends all others. What ended with kExitBadInput is not started again and its
/// code is returned; after any other death all ranks start again, `restarts` times at most. SIGINT
/// and SIGTERM go to every rank; the second one kills them. Ranks die with this process, however it
/// dies. Errors: InputError where no process can be started; Error naming rank, process and death
/// when the restarts are used up.
int launch(const Launch& launch);

}  // namespace hadal::dist
