// New weights: between requests, so that each is answered by one version.
#include <utility>

#include "base/check.h"
#include "engine_core/schedule/scheduler.h"
#include "engine_core/schedule/scheduler_state.h"

namespace hadal::engine_core {

void Scheduler::hold_waiting() {
  if (std::exchange(holds_waiting_, true)) return;
  for (const auto& [id, request] : requests_) {
    Sequence& first = *request->sequences.front();
    if (request->admitted || first.phase != Sequence::Phase::kWaiting) continue;
    queue_.remove(first.arrival);
    waiting_.erase(first.arrival);
    first.phase = Sequence::Phase::kAwaitsPrompt;
  }
}

void Scheduler::update_weights(const WeightsUpdate& update) {
  HADAL_CHECK(holds_waiting_ && drained(), "scheduler: new weights while requests run");
  const auto let_begin = [this] {
    holds_waiting_ = false;
    for (const auto& [id, request] : requests_) enqueue(*request->sequences.front(), false);
  };
  try {
    HADAL_INPUT_CHECK(update.version.number > weights_->number, "weights: version ",
                      update.version.number, ", expected more than ", weights_->number);
    update.swap();
  } catch (...) {
    let_begin();
    throw;
  }
  cache_.clear_tree();
  weights_ = std::make_shared<WeightsVersion>(update.version);
  let_begin();
}

}  // namespace hadal::engine_core
