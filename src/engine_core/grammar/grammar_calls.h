// Parameters of tool calls in any order: each at most once, and none that is required left out.
// A grammar of all orders would be too large, so sessions follow the markup and forbid what the
// grammar cannot: a second parameter of a name, and a call's end while parameters are missing.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace hadal::engine_core {

/// What a tool's calls may hold.
struct CallParameters {
  std::string tool;
  std::vector<std::string> names;     ///< all there are, unless `any`
  std::vector<std::string> required;  ///< of them
  bool any = false;                   ///< other names, too
};

/// Where an answer stands in its calls. Cheap to copy, so that tokens can be taken back.
class CallTracker {
 public:
  /// Null: an answer without calls, where everything is allowed.
  explicit CallTracker(std::shared_ptr<const std::vector<CallParameters>> tools)
      : tools_(std::move(tools)) {}

  /// Whether anything can be forbidden here: between the parts of a call and in their tags.
  bool watches() const { return state_ != nullptr && state_->place != Place::kValue; }
  bool allows(std::string_view bytes) const;
  bool allows_marker() const;
  void add(std::string_view bytes);
  void add_marker();

 private:
  enum class Place : uint8_t { kOutside, kCall, kTag, kValue };
  struct State {
    Place place = Place::kOutside;
    bool closing = false;
    std::string tail;                      ///< of the tag, or the last bytes before one
    const CallParameters* tool = nullptr;  ///< of the call
    std::vector<std::string> used;
  };
  bool is_used(std::string_view name) const;
  bool is_missing() const;
  bool is_full() const;
  void end_tag(State& state) const;

  std::shared_ptr<const std::vector<CallParameters>> tools_;
  std::shared_ptr<const State> state_;  ///< null: before the first marker
};

}  // namespace hadal::engine_core
