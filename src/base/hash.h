// Hashes that are part of file formats and of random streams: fixed for ever.
#pragma once

#include <cstdint>
#include <string_view>

namespace hadal {

/// 64-bit FNV-1a.
constexpr uint64_t fnv1a64(std::string_view text, uint64_t state = 0xcbf29ce484222325ull) {
  for (const char c : text) {
    state ^= static_cast<unsigned char>(c);
    state *= 0x100000001b3ull;
  }
  return state;
}

}  // namespace hadal
