#include "text/utf8.h"

#include <cstring>

namespace hadal::text {
namespace {

constexpr char32_t kReplacement = 0xFFFD;

/// Appends the repaired text up to its end, or up to a truncated character if `keep_truncated`;
/// returns where it stopped.
size_t append_repaired(std::string_view text, bool keep_truncated, std::string& out) {
  size_t pos = 0;
  while (pos < text.size()) {
    const size_t valid = valid_utf8_prefix(text.substr(pos));
    out.append(text.substr(pos, valid));
    pos += valid;
    if (pos == text.size()) break;
    const Utf8Char bad = decode_utf8(text, pos);
    if (keep_truncated && bad.status == Utf8Status::kTruncated) break;
    append_utf8(out, kReplacement);
    pos += bad.length;
  }
  return pos;
}

}  // namespace

Utf8Char decode_utf8(std::string_view text, size_t pos) {
  const auto lead = static_cast<uint8_t>(text[pos]);
  if (lead < 0x80) return {lead, 1, Utf8Status::kValid};
  uint32_t length = 0;
  // The second byte's range excludes overlong forms, surrogates and values above U+10FFFF.
  uint8_t low = 0x80;
  uint8_t high = 0xBF;
  char32_t code = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
    code = lead & 0x1Fu;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    code = lead & 0x0Fu;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    code = lead & 0x07u;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {kReplacement, 1, Utf8Status::kInvalid};
  }
  for (uint32_t i = 1; i < length; ++i) {
    if (pos + i == text.size()) return {kReplacement, i, Utf8Status::kTruncated};
    const auto byte = static_cast<uint8_t>(text[pos + i]);
    if (byte < low || byte > high) return {kReplacement, i, Utf8Status::kInvalid};
    code = code << 6 | (byte & 0x3Fu);
    low = 0x80;
    high = 0xBF;
  }
  return {code, length, Utf8Status::kValid};
}

void append_utf8(std::string& out, char32_t code_point) {
  if (code_point > 0x10FFFF || (code_point >= 0xD800 && code_point < 0xE000))
    code_point = kReplacement;
  if (code_point < 0x80) {
    out.push_back(static_cast<char>(code_point));
    return;
  }
  const auto tail = [&](uint32_t shift) {
    out.push_back(static_cast<char>(0x80u | ((code_point >> shift) & 0x3Fu)));
  };
  if (code_point < 0x800) {
    out.push_back(static_cast<char>(0xC0u | (code_point >> 6)));
  } else if (code_point < 0x10000) {
    out.push_back(static_cast<char>(0xE0u | (code_point >> 12)));
    tail(6);
  } else {
    out.push_back(static_cast<char>(0xF0u | (code_point >> 18)));
    tail(12);
    tail(6);
  }
  tail(0);
}

size_t valid_utf8_prefix(std::string_view text) {
  size_t pos = 0;
  while (pos < text.size()) {
    // Eight ASCII bytes at a time: most text is.
    while (pos + 8 <= text.size()) {
      uint64_t word = 0;
      std::memcpy(&word, text.data() + pos, 8);
      if ((word & 0x8080808080808080u) != 0) break;
      pos += 8;
    }
    if (pos == text.size()) break;
    if (static_cast<uint8_t>(text[pos]) < 0x80) {  // of the last few, or beside others
      ++pos;
      continue;
    }
    const Utf8Char c = decode_utf8(text, pos);
    if (c.status != Utf8Status::kValid) return pos;
    pos += c.length;
  }
  return pos;
}

std::string repair_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  append_repaired(text, /*keep_truncated=*/false, out);
  return out;
}

std::string Utf8Stream::push(std::string_view bytes) {
  std::string out;
  if (pending_.empty()) {
    const size_t used = append_repaired(bytes, /*keep_truncated=*/true, out);
    pending_.assign(bytes.substr(used));
  } else {
    pending_.append(bytes);
    const size_t used = append_repaired(pending_, /*keep_truncated=*/true, out);
    pending_.erase(0, used);
  }
  return out;
}

std::string Utf8Stream::flush() {
  std::string out = repair_utf8(pending_);
  pending_.clear();
  return out;
}

}  // namespace hadal::text
