// What is thrown when one of several ranks is gone.
#pragma once

#include <string>

#include "base/check.h"

namespace hadal::dist {

/// A rank is gone, or did not come within the time allowed. what() names it where that can be told.
/// The program's exit code for it is 4.
class RankLost : public Error {
 public:
  explicit RankLost(const std::string& message) : Error(Verbatim{}, message) {}
};

}  // namespace hadal::dist
