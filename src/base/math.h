// Small integer helpers.
#pragma once

#include <cstdint>
#include <limits>

#include "base/check.h"

namespace hadal {

/// Smallest integer >= a / b, for a >= 0 and b > 0.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Smallest multiple of b that is >= a, for a >= 0 and b > 0.
constexpr int64_t align_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/// The same value in a narrower type; throws Error when it does not fit.
template <typename To, typename From>
To narrow(From value) {
  const To result = static_cast<To>(value);
  HADAL_CHECK(static_cast<From>(result) == value && ((result < To{}) == (value < From{})),
              "narrow: ", +value, " does not fit");
  return result;
}

}  // namespace hadal
