#include "engine/recorded_steps.h"

#include <algorithm>
#include <bit>
#include <exception>

#include "base/log.h"
#include "base/math.h"

namespace hadal::engine {

int64_t RecordedSteps::padded_end(int64_t end) {
  const auto below =
      static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(end, 1))));
  return align_up(end, std::max<int64_t>(1024, below / 8));
}

namespace {

int64_t bytes_of(const StepOutput& output) {
  int64_t bytes = static_cast<int64_t>(output.streams.nbytes());
  if (output.logits.defined()) bytes += static_cast<int64_t>(output.logits.nbytes());
  for (const auto& [layer, selection] : *output.selections)
    bytes += static_cast<int64_t>(selection.nbytes());
  return bytes;
}

}  // namespace

void RecordedSteps::clear() {
  kept_.clear();
  bytes_ = 0;
}

StepOutput RecordedSteps::run(const std::vector<int64_t>& lengths,
                              int64_t padded_end,
                              int64_t moves,
                              const std::function<StepOutput()>& step) {
  if (moves != moves_) clear();
  moves_ = moves;
  const auto [place, fresh] = kept_.try_emplace(Key{padded_end, lengths});
  Kept& kept = place->second;
  kept.used = ++clock_;
  if (fresh) {
    if (kept_.size() > kMostGraphs) forget_oldest();
    return step();
  }
  if (kept.refused) return step();
  if (kept.graph == nullptr) {
    if (num_graphs() == 0) memory_.renew();
    try {
      kept.graph = std::make_unique<ops::RecordedGraph>(memory_, [&] { kept.output = step(); });
    } catch (const std::exception& error) {
      // Nothing ran yet. The answer is the same, later.
      log::warn("engine", "steps of ", lengths.size(),
                " sequences cannot be recorded and run slower: ", error.what());
      kept.output = {};
      kept.refused = true;
      return step();
    }
  }
  if (kept.bytes == 0) {
    kept.bytes = bytes_of(kept.output);
    bytes_ += kept.bytes;
    while (bytes_ > kMostBytes && kept_.size() > 1) forget_oldest();
  }
  kept.graph->replay();
  return kept.output;
}

void RecordedSteps::forget_oldest() {
  const auto oldest =
      std::ranges::min_element(kept_, {}, [](const auto& entry) { return entry.second.used; });
  bytes_ -= oldest->second.bytes;
  kept_.erase(oldest);
}

int64_t RecordedSteps::num_graphs() const {
  return std::ranges::count_if(kept_,
                               [](const auto& entry) { return entry.second.graph != nullptr; });
}

}  // namespace hadal::engine
