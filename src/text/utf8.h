// UTF-8: decoding, validation, repair, and a stream that never hands out half a character.
//
// Invalid bytes become U+FFFD, one for each maximal subpart (Unicode 16, section 3.9, table 3-8):
// the same text whether it is repaired whole or in pieces. Nothing here throws; streams belong to
// one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace hadal::text {

enum class Utf8Status : uint8_t {
  kValid,
  kInvalid,    ///< no character starts like this
  kTruncated,  ///< the text ends inside what could become a character
};

/// What stands at one position of a text.
struct Utf8Char {
  char32_t code_point = 0;  ///< U+FFFD unless valid
  uint32_t length = 0;      ///< bytes of the character or of the maximal subpart, at least 1
  Utf8Status status = Utf8Status::kValid;
};

/// Decodes the character at text[pos]; pos < text.size().
Utf8Char decode_utf8(std::string_view text, size_t pos);

/// Appends a code point; surrogates and values above U+10FFFF are written as U+FFFD.
void append_utf8(std::string& out, char32_t code_point);

/// Bytes before the first ill-formed sequence; text.size() if there is none.
size_t valid_utf8_prefix(std::string_view text);

/// The text with every maximal subpart of an ill-formed sequence replaced by U+FFFD.
std::string repair_utf8(std::string_view text);

/// Turns chunks of bytes, cut anywhere, into valid UTF-8; push() and flush() concatenated equal
/// repair_utf8 of the whole.
class Utf8Stream {
 public:
  /// Adds bytes; returns what is complete now.
  std::string push(std::string_view bytes);
  /// Ends the text: an unfinished character becomes U+FFFD.
  std::string flush();
  /// Bytes held back, 0 to 3.
  size_t pending() const { return pending_.size(); }

 private:
  std::string pending_;
};

}  // namespace hadal::text
