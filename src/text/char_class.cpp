#include "text/char_class.h"

#include <algorithm>
#include <cstddef>
#include <map>
#include <span>

namespace hadal::text {
namespace {

#include "text/char_class_table.inc"

constexpr uint32_t kSpaceRanges[] = {0x9,    0xd,    0x20,   0x20,   0x85,   0x85,   0xa0,
                                     0xa0,   0x1680, 0x1680, 0x2000, 0x200a, 0x2028, 0x2029,
                                     0x202f, 0x202f, 0x205f, 0x205f, 0x3000, 0x3000};
constexpr uint32_t kHanKanaRanges[] = {0x3040, 0x30ff, 0x4e00, 0x9fa5};

void mark(std::vector<uint8_t>& flags, std::span<const uint32_t> ranges, CharClass flag) {
  for (size_t i = 0; i < ranges.size(); i += 2) {
    for (uint32_t code = ranges[i]; code <= ranges[i + 1]; ++code) flags[code] |= flag;
  }
}

}  // namespace

CharClassTable::CharClassTable() {
  std::vector<uint8_t> flags(0x110000, 0);
  mark(flags, kLetterRanges, kLetter);
  mark(flags, kMarkRanges, kMark);
  mark(flags, kNumberRanges, kNumber);
  mark(flags, kSymbolRanges, kSymbol);
  mark(flags, kSpaceRanges, kSpace);
  mark(flags, kHanKanaRanges, kHanKana);
  std::map<Block, uint16_t> known;
  for (size_t first = 0; first < flags.size(); first += 256) {
    Block block;
    std::copy_n(flags.begin() + static_cast<std::ptrdiff_t>(first), 256, block.begin());
    const auto [entry, added] = known.try_emplace(block, static_cast<uint16_t>(blocks_.size()));
    if (added) blocks_.push_back(block);
    block_of_.push_back(entry->second);
  }
}

const CharClassTable& CharClassTable::get() {
  static const CharClassTable table;
  return table;
}

}  // namespace hadal::text
