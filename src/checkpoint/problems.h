// Problems of one kind found in a checkpoint, of which the first few are named in one message.
#pragma once

#include <cstddef>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/join.h"
#include "base/log.h"

namespace hadal::checkpoint {

class Problems {
 public:
  /// The same text counts once: tensors of many experts may lie in one.
  void add(const std::string& text) {
    if (!seen_.insert(text).second) return;
    if (listed_.size() < kListed) listed_.push_back(text);
  }
  bool any() const { return !seen_.empty(); }
  /// "3 tensors are missing: a; b; c".
  std::string text(const char* what) const {
    return concat(seen_.size(), " ", what, ": ", join(listed_, "; "),
                  seen_.size() > kListed ? "; ..." : "");
  }
  /// An InputError if there are any.
  void refuse(const std::string& path, const char* what) const {
    HADAL_INPUT_CHECK(!any(), path, ": ", text(what));
  }
  /// A warning if there are any.
  void warn(const std::string& path, const char* what) const {
    if (any()) log::warn("checkpoint", path, ": ", text(what));
  }

 private:
  static constexpr size_t kListed = 20;
  std::set<std::string> seen_;
  std::vector<std::string> listed_;
};

}  // namespace hadal::checkpoint
