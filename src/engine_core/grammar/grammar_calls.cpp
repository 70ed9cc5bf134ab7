#include "engine_core/grammar/grammar_calls.h"

#include <algorithm>

namespace hadal::engine_core {
namespace {

constexpr std::string_view kParameter = "parameter name=\"", kInvoke = "invoke name=\"",
                           kKeyEnd = "\" string=\"";
constexpr size_t kTail = 2;  ///< bytes before a marker that say what its tag is

/// Whether one of two texts begins with the other.
bool agree(std::string_view a, std::string_view b) {
  const size_t size = std::min(a.size(), b.size());
  return a.substr(0, size) == b.substr(0, size);
}

/// The key of a parameter's tag, once it is whole; else nothing and false.
bool key_of(std::string_view tag, std::string_view& key) {
  if (!tag.starts_with(kParameter)) return false;
  const size_t end = tag.find('"', kParameter.size());
  if (end == std::string_view::npos) return false;
  key = tag.substr(kParameter.size(), end - kParameter.size());
  return true;
}

}  // namespace

bool CallTracker::is_used(std::string_view name) const {
  return std::find(state_->used.begin(), state_->used.end(), name) != state_->used.end();
}

bool CallTracker::is_missing() const {
  const auto& required = state_->tool->required;
  return std::any_of(required.begin(), required.end(),
                     [&](const std::string& name) { return !is_used(name); });
}

bool CallTracker::is_full() const {
  const auto& names = state_->tool->names;
  return !state_->tool->any && std::all_of(names.begin(), names.end(),
                                           [&](const std::string& name) { return is_used(name); });
}

bool CallTracker::allows(std::string_view bytes) const {
  if (!watches() || state_->tool == nullptr) return true;
  const std::string text = state_->tail + std::string(bytes);
  if (state_->place == Place::kCall) return text.find("</") == std::string::npos || !is_missing();
  if (state_->place != Place::kTag || state_->closing) return true;
  if (!agree(text, kParameter)) return true;
  if (state_->tool->any) {
    std::string_view key;
    return !key_of(text, key) || !is_used(key);
  }
  const auto& names = state_->tool->names;
  return std::any_of(names.begin(), names.end(), [&](const std::string& name) {
    return !is_used(name) && agree(text, std::string(kParameter) + name + std::string(kKeyEnd));
  });
}

bool CallTracker::allows_marker() const {
  if (!watches() || state_->tool == nullptr || state_->place != Place::kCall) return true;
  return state_->tail.ends_with("</") ? !is_missing() : !is_full();
}

void CallTracker::add_marker() {
  if (tools_ == nullptr) return;
  auto next = state_ == nullptr ? std::make_shared<State>() : std::make_shared<State>(*state_);
  next->closing = next->tail.ends_with("</");
  next->tail.clear();
  next->place = Place::kTag;
  state_ = std::move(next);
}

void CallTracker::add(std::string_view bytes) {
  if (state_ == nullptr) return;
  if (state_->place != Place::kTag) {
    // Only what stands before the next marker counts.
    const std::string_view last = bytes.substr(bytes.size() - std::min(bytes.size(), kTail));
    if (state_->tail.empty() && last.find_first_of("</") == std::string_view::npos) return;
    auto next = std::make_shared<State>(*state_);
    next->tail += last;
    next->tail.erase(0, next->tail.size() - std::min(next->tail.size(), kTail));
    state_ = std::move(next);
    return;
  }
  auto next = std::make_shared<State>(*state_);
  next->tail += bytes;
  end_tag(*next);
  state_ = std::move(next);
}

/// Leaves the tag if its text is whole. Names hold no '>'.
void CallTracker::end_tag(State& state) const {
  const size_t end = state.tail.find('>');
  if (end == std::string::npos) return;
  const std::string tag = state.tail.substr(0, end);
  const bool in_call = state.tool != nullptr;
  state.tail.erase(0, end + 1);
  if (state.closing) {
    state.place = in_call && tag == "parameter" ? Place::kCall : Place::kOutside;
    if (state.place == Place::kOutside) state.tool = nullptr;
  } else if (std::string_view key; in_call && key_of(tag, key)) {
    state.used.emplace_back(key);
    state.place = Place::kValue;
  } else if (tag.starts_with(kInvoke)) {
    const std::string name = tag.substr(kInvoke.size(), tag.size() - kInvoke.size() - 1);
    const auto found = std::find_if(tools_->begin(), tools_->end(),
                                    [&](const CallParameters& one) { return one.tool == name; });
    state.tool = found == tools_->end() ? nullptr : &*found;
    state.used.clear();
    state.place = Place::kCall;
  } else {
    state.place = Place::kOutside;
  }
  state.tail.erase(0, state.tail.size() - std::min(state.tail.size(), kTail));
}

}  // namespace hadal::engine_core
