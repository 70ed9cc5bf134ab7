// The Unicode classes the official pre-tokeniser distinguishes, as one byte of flags per code
// point.
//
// General categories come from Unicode 16, the version of the library that defines the official
// token ids; kSpace is the property White_Space (what `\s` means there). The table is built once,
// on first use, and then only read.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace hadal::text {

enum CharClass : uint8_t {
  kLetter = 1,  ///< \p{L}
  kMark = 2,    ///< \p{M}
  kNumber = 4,  ///< \p{N}
  kSymbol = 8,  ///< \p{P} or \p{S}
  kSpace = 16,  ///< \s
  kHanKana =
      32  ///< U+4E00..9FA5, U+3040..309F, U+30A0..30FF: the second stage of chat_encoding.md 6
};

/// Flags of every code point, in blocks of 256 that equal ones share.
class CharClassTable {
 public:
  static const CharClassTable& get();

  uint8_t operator()(char32_t code_point) const {
    return code_point > 0x10FFFF ? 0 : blocks_[block_of_[code_point >> 8]][code_point & 0xFF];
  }

 private:
  using Block = std::array<uint8_t, 256>;
  CharClassTable();

  std::vector<uint16_t> block_of_;  // [0x1100]
  std::vector<Block> blocks_;
};

}  // namespace hadal::text
