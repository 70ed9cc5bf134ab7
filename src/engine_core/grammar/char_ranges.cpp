#include "engine_core/grammar/char_ranges.h"

#include <algorithm>

namespace hadal::engine_core {

Ranges normalised(Ranges ranges) {
  std::sort(ranges.begin(), ranges.end());
  Ranges out;
  for (const auto& range : ranges) {
    if (!out.empty() && range.first <= out.back().second + 1) {
      out.back().second = std::max(out.back().second, range.second);
    } else {
      out.push_back(range);
    }
  }
  return out;
}

Ranges complement(const Ranges& ranges) {
  Ranges out;
  uint32_t next = 0;
  for (const auto& [first, last] : normalised(ranges)) {
    if (first > next) out.emplace_back(next, first - 1);
    next = last + 1;
  }
  if (next <= kLastCharacter) out.emplace_back(next, kLastCharacter);
  return out;
}

Ranges without(const Ranges& ranges, const Ranges& others) {
  Ranges both = complement(ranges);
  both.insert(both.end(), others.begin(), others.end());
  return complement(both);
}

bool holds(const Ranges& ranges, uint32_t code) {
  return std::any_of(ranges.begin(), ranges.end(), [code](const auto& range) {
    return range.first <= code && code <= range.second;
  });
}

Ranges letter_class(char kind) {
  const char lower = static_cast<char>(kind | 0x20);
  Ranges ranges;
  if (lower == 's') ranges = {{9, 13}, {' ', ' '}};
  if (lower == 'd') ranges = {{'0', '9'}};
  if (lower == 'w') ranges = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}};
  return kind == lower ? ranges : complement(ranges);
}

}  // namespace hadal::engine_core
