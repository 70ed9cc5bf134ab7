#include "train/pass_memory.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "base/check.h"

namespace hadal::train {

PassTrace::PassTrace() {
  HADAL_CHECK(ops::watch_tensor_memory(this) == nullptr, "memory: another trace watches");
}
PassTrace::~PassTrace() { stop(); }
void PassTrace::stop() {
  if (std::exchange(watching_, false)) ops::watch_tensor_memory(nullptr);
}

void PassTrace::forward_ended() { events_.push_back({.kind = Kind::kForwardEnded}); }

void PassTrace::allocated(const void* data, int64_t bytes) {
  events_.push_back({.kind = Kind::kAllocated, .number = bytes, .data = data});
}
void PassTrace::freed(const void* data, int64_t bytes) {
  events_.push_back({.kind = Kind::kFreed, .number = bytes, .data = data});
}
void PassTrace::ran(int64_t function,
                    const std::vector<int64_t>& inputs,
                    const std::vector<Result>& results) {
  HADAL_CHECK(function == std::ssize(functions_), "memory: a trace of several passes");
  functions_.push_back({.inputs = inputs, .results = {}});
  for (const Result& result : results) {
    functions_.back().results.push_back(result.slot);
    slots_.push_back(
        {.label = result.label, .bytes = result.bytes, .function = function, .data = result.data});
  }
  events_.push_back({.kind = Kind::kRan, .number = function});
}
void PassTrace::annotated(int64_t slot) { slots_.at(static_cast<size_t>(slot)).annotated = true; }
void PassTrace::needed(int64_t slot) { events_.push_back({.kind = Kind::kNeeded, .number = slot}); }
void PassTrace::released(int64_t slot) {
  events_.push_back({.kind = Kind::kReleased, .number = slot});
}
void PassTrace::runs_again(int64_t function) {
  events_.push_back({.kind = Kind::kRunsAgain, .number = function});
}
void PassTrace::ran_again(int64_t function, double seconds) {
  functions_.at(static_cast<size_t>(function)).seconds = seconds;
  events_.push_back({.kind = Kind::kRanAgain, .number = function});
}

/// Turns a trace into the events of the pass without anything that ran again: what belongs to
/// results is told by the results, the rest is summed between them.
struct PassMemory::Reader {
  PassMemory& memory;
  const PassTrace& trace;
  std::unordered_map<const void*, int64_t> born;   ///< data to slot, as the forward pass made it
  std::unordered_map<const void*, int64_t> again;  ///< bytes that a second run left
  int64_t running = -1;                            ///< function that runs again
  int64_t level = 0;

  void bytes(int64_t delta) {
    std::vector<Event>& events = memory.events_;
    if (events.empty() || events.back().kind != Kind::kBytes)
      events.push_back({.kind = Kind::kBytes});
    events.back().net += delta;
    events.back().rise = std::max(events.back().rise, events.back().net);
  }
  Function& function(int64_t number) { return memory.functions_[static_cast<size_t>(number)]; }
  Slot& slot(int64_t number) { return memory.slots_[static_cast<size_t>(number)]; }

  /// Which allocation is a result's: the last one at its address before its function was done.
  std::unordered_map<size_t, int64_t> births() const {
    std::unordered_map<size_t, int64_t> found;
    std::unordered_map<const void*, size_t> last;
    const auto& events = trace.events();
    for (size_t i = 0; i < events.size(); ++i) {
      if (events[i].kind == PassTrace::Kind::kAllocated) last[events[i].data] = i;
      if (events[i].kind != PassTrace::Kind::kRan) continue;
      for (const int64_t result :
           trace.functions()[static_cast<size_t>(events[i].number)].results) {
        const auto at = last.find(trace.slots()[static_cast<size_t>(result)].data);
        if (at != last.end()) found[at->second] = result;
      }
    }
    return found;
  }

  /// Results that die before the backward pass asks for them, or that it never asks for.
  void find_mortal(const std::unordered_map<size_t, int64_t>& births) {
    std::unordered_map<const void*, int64_t> alive;
    std::vector<bool> asked(memory.slots_.size(), false);
    const auto& events = trace.events();
    for (size_t i = 0; i < events.size(); ++i) {
      const PassTrace::Event& event = events[i];
      if (const auto birth = births.find(i); birth != births.end()) {
        alive[event.data] = birth->second;
      } else if (event.kind == PassTrace::Kind::kFreed) {
        const auto found = alive.find(event.data);
        if (found == alive.end()) continue;
        slot(found->second).can_die = !asked[static_cast<size_t>(found->second)];
        alive.erase(found);
      } else if (event.kind == PassTrace::Kind::kNeeded) {
        asked[static_cast<size_t>(event.number)] = true;
        slot(event.number).saved = true;
      } else if (event.kind == PassTrace::Kind::kReleased) {
        slot(event.number).saved = true;
      }
    }
  }

  /// A result may be saved, released and saved again; the last time counts.
  std::unordered_map<int64_t, size_t> last_releases() const {
    std::unordered_map<int64_t, size_t> last;
    const auto& events = trace.events();
    for (size_t i = 0; i < events.size(); ++i) {
      if (events[i].kind == PassTrace::Kind::kReleased) last[events[i].number] = i;
    }
    return last;
  }

  void allocated(size_t index,
                 const PassTrace::Event& event,
                 const std::unordered_map<size_t, int64_t>& births) {
    if (running >= 0) {
      again[event.data] = event.number;
      level += event.number;
      function(running).rise = std::max(function(running).rise, level);
      return;
    }
    const auto birth = births.find(index);
    if (birth == births.end() || !slot(birth->second).can_die) return bytes(event.number);
    born[event.data] = birth->second;
    memory.events_.push_back({.kind = Kind::kBorn, .slot = birth->second});
  }

  void freed(const PassTrace::Event& event) {
    if (const auto left = again.find(event.data); left != again.end()) {
      if (running >= 0) level -= event.number;
      again.erase(left);
    } else if (const auto of = born.find(event.data); of != born.end()) {
      memory.events_.push_back({.kind = Kind::kDied, .slot = of->second});
      born.erase(of);
    } else {
      bytes(-event.number);
    }
  }

  void read() {
    const std::unordered_map<size_t, int64_t> births_of = births();
    const std::unordered_map<int64_t, size_t> releases = last_releases();
    find_mortal(births_of);
    const auto& events = trace.events();
    for (size_t i = 0; i < events.size(); ++i) {
      const PassTrace::Event& event = events[i];
      switch (event.kind) {
        case PassTrace::Kind::kAllocated:
          allocated(i, event, births_of);
          break;
        case PassTrace::Kind::kFreed:
          freed(event);
          break;
        case PassTrace::Kind::kNeeded:
          memory.events_.push_back({.kind = Kind::kNeeded, .slot = event.number});
          break;
        case PassTrace::Kind::kReleased:
          if (releases.at(event.number) == i)
            memory.events_.push_back({.kind = Kind::kReleased, .slot = event.number});
          break;
        case PassTrace::Kind::kRunsAgain:
          running = event.number;
          level = 0;
          break;
        case PassTrace::Kind::kRanAgain:
          running = -1;
          break;
        case PassTrace::Kind::kForwardEnded:
          memory.events_.push_back({.kind = Kind::kForwardEnded});
          break;
        case PassTrace::Kind::kRan:
          break;
      }
    }
  }
};

PassMemory::PassMemory(const PassTrace& trace) {
  for (const PassTrace::Slot& slot : trace.slots()) {
    slots_.push_back({.label = slot.label,
                      .bytes = slot.bytes,
                      .function = slot.function,
                      .annotated = slot.annotated});
  }
  for (const PassTrace::Function& function : trace.functions()) {
    functions_.push_back(
        {.inputs = function.inputs, .results = function.results, .seconds = function.seconds});
  }
  Reader{.memory = *this, .trace = trace, .born = {}, .again = {}}.read();
  find_candidates();
}

void PassMemory::find_candidates() {
  std::vector<bool> crosses(slots_.size(), false);
  for (const Function& function : functions_) {
    if (function.results.empty()) continue;
    const int64_t block = slots_[static_cast<size_t>(function.results.front())].label.block;
    for (const int64_t input : function.inputs) {
      const auto slot = static_cast<size_t>(input);
      crosses[slot] = crosses[slot] || slots_[slot].label.block != block;
    }
  }
  for (size_t number = 0; number < functions_.size(); ++number) {
    Candidate candidate{.function = static_cast<int64_t>(number), .labels = {}};
    candidate.seconds = functions_[number].seconds;
    for (const int64_t result : functions_[number].results) {
      Slot& slot = slots_[static_cast<size_t>(result)];
      if (!slot.annotated || !slot.saved || !slot.can_die) continue;
      slot.candidate = std::ssize(candidates_);
      candidate.labels.push_back(slot.label);
      candidate.bytes += slot.bytes;
      candidate.crosses = candidate.crosses || crosses[static_cast<size_t>(result)];
    }
    if (!candidate.labels.empty()) candidates_.push_back(std::move(candidate));
  }
}

/// Does what a tape would: see Slot and Function in ops/tape.cpp.
struct PassMemory::Simulation {
  const PassMemory& memory;
  std::vector<bool> dropped, alive;     ///< of slots
  std::vector<int64_t> slot_users;      ///< the graph, and functions that may take it
  std::vector<int64_t> function_users;  ///< results that may need it; 0: gone
  int64_t level = 0;
  Prediction result;

  template <typename Drops>
  Simulation(const PassMemory& of, const Drops& drops)
      : memory(of),
        dropped(of.slots_.size()),
        alive(of.slots_.size(), false),
        slot_users(of.slots_.size(), 0),
        function_users(of.functions_.size(), 0) {
    for (size_t i = 0; i < dropped.size(); ++i) {
      const Slot& slot = of.slots_[i];
      dropped[i] = !slot.saved || (slot.candidate >= 0 && drops(slot));
    }
    for (size_t i = 0; i < dropped.size(); ++i) {
      if (of.slots_[i].saved) use(i);
    }
  }

  void use(size_t slot) {
    if (slot_users[slot]++ > 0 || !dropped[slot]) return;
    const auto function = static_cast<size_t>(memory.slots_[slot].function);
    if (function_users[function]++ > 0) return;
    for (const int64_t input : memory.functions_[function].inputs) use(static_cast<size_t>(input));
  }
  void let_go(size_t slot) {
    if (--slot_users[slot] > 0) return;
    if (memory.slots_[slot].can_die && alive[slot]) {
      level -= memory.slots_[slot].bytes;
      alive[slot] = false;
    }
    if (!dropped[slot]) return;
    const auto function = static_cast<size_t>(memory.slots_[slot].function);
    if (function_users[function] == 0 || --function_users[function] > 0) return;
    for (const int64_t input : memory.functions_[function].inputs)
      let_go(static_cast<size_t>(input));
  }
  void rise(int64_t bytes) { result.peak_bytes = std::max(result.peak_bytes, level + bytes); }

  void restore(size_t slot) {
    if (alive[slot] || !memory.slots_[slot].can_die) return;
    const auto number = static_cast<size_t>(memory.slots_[slot].function);
    const Function& function = memory.functions_[number];
    for (const int64_t input : function.inputs) restore(static_cast<size_t>(input));
    rise(function.rise);
    result.seconds += function.seconds;
    for (const int64_t made : function.results) {
      const auto i = static_cast<size_t>(made);
      if (slot_users[i] == 0 || alive[i] || !memory.slots_[i].can_die) continue;
      alive[i] = true;
      level += memory.slots_[i].bytes;
    }
    function_users[number] = 0;
    for (const int64_t input : function.inputs) let_go(static_cast<size_t>(input));
  }

  void run() {
    for (const Event& event : memory.events_) {
      const auto slot = static_cast<size_t>(event.slot);
      const bool of_slot = event.kind != Kind::kBytes && event.kind != Kind::kForwardEnded;
      const bool mortal = of_slot && memory.slots_[slot].can_die;
      switch (event.kind) {
        case Kind::kBytes:
          rise(event.rise);
          level += event.net;
          break;
        case Kind::kBorn:
          alive[slot] = true;
          level += memory.slots_[slot].bytes;
          rise(0);
          break;
        case Kind::kDied:
          if (!dropped[slot] || !alive[slot]) break;
          alive[slot] = false;
          level -= memory.slots_[slot].bytes;
          break;
        case Kind::kNeeded:
          if (mortal) restore(slot);
          break;
        case Kind::kReleased:
          let_go(slot);
          break;
        case Kind::kForwardEnded:
          result.kept_bytes = level;
          break;
      }
    }
  }
};

PassMemory::Prediction PassMemory::predict(
    const std::function<bool(const ops::TensorLabel&)>& drops) const {
  Simulation simulation(*this, [&](const Slot& slot) { return drops(slot.label); });
  simulation.run();
  return simulation.result;
}

PassMemory::Prediction PassMemory::predict(const std::vector<bool>& taken) const {
  HADAL_CHECK(taken.size() == candidates_.size(), "memory: ", taken.size(), " marks for ",
              candidates_.size(), " candidates");
  Simulation simulation(
      *this, [&](const Slot& slot) { return taken[static_cast<size_t>(slot.candidate)]; });
  simulation.run();
  return simulation.result;
}

}  // namespace hadal::train
