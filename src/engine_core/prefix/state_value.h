// What a kept state is worth: how many tokens its loss is expected to cost, computed again, for the
// pages it frees.
//
// Time is counted in uses of the tree (sequences begun). A conversation that came back after so
// many uses is expected to again; one of which nothing is known has the longer to wait the longer
// it was not seen; one that is overdue is given up by and by. So whoever goes round more
// conversations than there is room for keeps those that come next rather than those that came last.
// How likely a state of a kind is to be used at all is learnt from those before it.
#pragma once

#include <array>
#include <cstdint>

namespace hadal::engine_core {

enum class StateKind : uint8_t {
  kPage,    ///< on the way, at a page's end: for those that begin alike and go on otherwise
  kPrompt,  ///< before a prompt's last token
  kEnd,     ///< where an answer ended
  kAgain,   ///< of any kind, used once: the next one like it lies behind
};

/// How many uses until it is needed, from those that passed since the last one. `interval`: between
/// its uses before, 0: unknown; `usual`: that of others.
double expected_wait(uint64_t age, uint64_t interval, double usual);

/// Of those that come back: one of how many states of a kind is what they go on from.
class StateOdds {
 public:
  void count_used(StateKind kind);
  void count_passed(StateKind kind);     ///< they went on from a later one
  double against(StateKind kind) const;  ///< at least 1

 private:
  struct Count {
    double used = 0, passed = 0;
  };
  // Before anything is known: pages' ends serve one in sixteen, ends always.
  std::array<Count, 4> counts_ = {{{1, 15}, {1, 3}, {1, 0}, {1, 7}}};
};

}  // namespace hadal::engine_core
