// The official pre-tokeniser (chat_encoding.md 6, three Split stages) as one hand-written pass over
// valid UTF-8.
//
// It yields the same pieces as the three regular expressions run one after the other; PreTokenizer
// uses it when a file asks for exactly those expressions, and its test compares the two.
// Header-only because it is the inner loop of encoding. A splitter belongs to one thread; the text
// outlives it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "text/char_class.h"
#include "text/utf8.h"

namespace hadal::text {

class OfficialSplitter {
 public:
  explicit OfficialSplitter(std::string_view text) : table_(CharClassTable::get()), text_(text) {}

  /// The next piece (never empty), or false at the end.
  bool next(std::string_view& piece) {
    if (pos_ == text_.size()) return false;
    const size_t begin = pos_;
    pos_ = piece_end(begin);
    piece = text_.substr(begin, pos_ - begin);
    return true;
  }

 private:
  struct Char {
    uint8_t flags;    ///< CharClass
    uint8_t length;   ///< bytes, 0 behind the end of the segment
    bool is_newline;  ///< \r or \n
  };

  Char at(size_t pos) const {
    if (pos >= text_.size()) return {0, 0, false};
    const auto byte = static_cast<uint8_t>(text_[pos]);
    if (byte < 0x80) return {table_(byte), 1, byte == '\n' || byte == '\r'};
    const Utf8Char c = decode_utf8(text_, pos);
    return {table_(c.code_point), static_cast<uint8_t>(c.length), false};
  }

  // Stages 1 and 2 cut the text into segments: up to three numbers, a run of Han or kana, anything
  // else. What stage 3 looks at, look-ahead included, ends with the segment.
  Char in_segment(size_t pos) const {
    const Char c = at(pos);
    if ((c.flags & kNumber) != 0 || (c.flags & kHanKana) != han_) return {0, 0, false};
    return c;
  }

  static bool is_ascii_letter(char c) { return static_cast<uint8_t>((c | 0x20) - 'a') < 26; }

  /// End of the run of characters with one of `wanted`, from pos.
  size_t run(size_t pos, uint8_t wanted) const {
    for (;;) {
      const Char c = in_segment(pos);
      if ((c.flags & wanted) == 0) return pos;
      pos += c.length;
    }
  }

  size_t letters(size_t pos) const {
    if (han_ == 0) {
      while (pos < text_.size() && is_ascii_letter(text_[pos])) ++pos;
      if (pos == text_.size() || static_cast<uint8_t>(text_[pos]) < 0x80) return pos;
    }
    return run(pos, kLetter | kMark);
  }

  size_t piece_end(size_t begin) {
    Char c = at(begin);
    if ((c.flags & kNumber) != 0) {
      size_t pos = begin;
      for (int count = 0; count < 3 && (c.flags & kNumber) != 0; ++count) {
        pos += c.length;
        c = at(pos);
      }
      return pos;
    }
    han_ = c.flags & kHanKana;
    if (const size_t end = match(begin, c); end != 0) return end;
    // Characters that no alternative matches stay together as one piece.
    size_t pos = begin + c.length;
    for (;;) {
      c = in_segment(pos);
      if (c.length == 0 || match(pos, c) != 0) return pos;
      pos += c.length;
    }
  }

  /// End of the match of stage 3 at pos, where c stands; 0 if there is none. Alternatives in the
  /// order of the pattern.
  size_t match(size_t pos, Char c) const {
    const size_t after = pos + c.length;
    // [!-/:-@[-`{-~][A-Za-z]+
    if ((c.flags & kSymbol) != 0 && c.length == 1 && after < text_.size() &&
        is_ascii_letter(text_[after])) {
      size_t end = after;
      while (end < text_.size() && is_ascii_letter(text_[end])) ++end;
      return end;
    }
    // [^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+
    if ((c.flags & (kLetter | kMark)) != 0) return letters(pos);
    const Char second = in_segment(after);
    if ((c.flags & kSymbol) == 0 && !c.is_newline && (second.flags & (kLetter | kMark)) != 0) {
      return letters(after);
    }
    //  ?[\p{P}\p{S}]+[\r\n]*
    const bool space_first = text_[pos] == ' ' && (second.flags & kSymbol) != 0;
    if (space_first || (c.flags & kSymbol) != 0) {
      size_t end = run(after, kSymbol);
      while (in_segment(end).is_newline) ++end;
      return end;
    }
    return (c.flags & kSpace) != 0 ? spaces(pos) : 0;
  }

  /// \s*[\r\n]+|\s+(?!\S)|\s+
  size_t spaces(size_t pos) const {
    size_t last = pos;         // start of the last space of the run
    size_t after_newline = 0;  // end of the last newline of the run
    size_t end = pos;
    Char c = in_segment(end);
    while ((c.flags & kSpace) != 0) {
      last = end;
      end += c.length;
      if (c.is_newline) after_newline = end;
      c = in_segment(end);
    }
    if (after_newline != 0) return after_newline;
    return c.length == 0 || last == pos ? end : last;
  }

  const CharClassTable& table_;
  std::string_view text_;
  size_t pos_ = 0;
  uint8_t han_ = 0;  ///< kHanKana inside a segment of stage 2, else 0
};

}  // namespace hadal::text
