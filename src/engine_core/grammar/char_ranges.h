// Sets of characters, as grammars and patterns need them: internal to them.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace hadal::engine_core {

/// Characters [first, second], ascending, with gaps between them.
using Ranges = std::vector<std::pair<uint32_t, uint32_t>>;

inline constexpr uint32_t kLastCharacter = 0x10FFFF;
inline const Ranges kSurrogates = {{0xD800, 0xDFFF}};

/// In any order and with overlaps, put in order.
Ranges normalised(Ranges ranges);
Ranges complement(const Ranges& ranges);
Ranges without(const Ranges& ranges, const Ranges& others);
bool holds(const Ranges& ranges, uint32_t code);
/// What \d, \w, \s and their complements stand for, in ASCII.
Ranges letter_class(char kind);

}  // namespace hadal::engine_core
