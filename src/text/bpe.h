// Byte-pair merging of one piece, and the cache that makes repeated pieces cheap.
//
// A piece starts as the ids of its bytes; the adjacent pair with the lowest merge rank (the
// leftmost of equals) is replaced by its result until no pair is in the table. Short pieces are
// scanned, long ones use a heap over a linked list, so n bytes cost O(n log n). Bpe is immutable
// and shared by threads; a PieceCache belongs to one at a time.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

namespace hadal::text {

/// left followed by right becomes result; the index in the list of merges is the rank.
struct Merge {
  int32_t left = 0;
  int32_t right = 0;
  int32_t result = 0;
};

class Bpe {
 public:
  /// byte_ids[b] is the id of the token that is the single byte b. Errors: InputError if a pair has
  /// two merges.
  Bpe(const std::array<int32_t, 256>& byte_ids, std::span<const Merge> merges);

  /// Appends the ids of one piece. With `applied`, also appends the rank of every merge in the
  /// order of application.
  void encode(std::string_view piece,
              std::vector<int32_t>& ids,
              std::vector<int32_t>* applied = nullptr) const;

 private:
  static constexpr int32_t kNoRank = INT32_MAX;
  static constexpr uint64_t kEmpty = UINT64_MAX;
  struct Slot {
    uint64_t pair = kEmpty;
    int32_t rank = kNoRank;
    int32_t result = 0;
  };

  static uint64_t pair_of(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  size_t slot_of(uint64_t pair) const { return (pair * 0x9E3779B97F4A7C15u) >> shift_; }
  Slot find(int32_t left, int32_t right) const;
  void merge_short(std::span<int32_t> symbols,
                   std::vector<int32_t>& ids,
                   std::vector<int32_t>* applied) const;
  void merge_long(std::string_view piece,
                  std::vector<int32_t>& ids,
                  std::vector<int32_t>* applied) const;

  std::array<int32_t, 256> byte_ids_;
  std::vector<Slot> slots_;  // open addressing, at most half full
  int shift_ = 0;
};

/// Remembers the ids of short pieces: direct-mapped, one cache line an entry.
class PieceCache {
 public:
  static constexpr size_t kMaxBytes = 29;
  static constexpr size_t kMaxIds = 8;

  struct Entry {
    uint8_t length = 0;  ///< bytes of the piece; 0 is an empty entry
    uint8_t count = 0;   ///< ids
    char bytes[30] = {};
    int32_t ids[kMaxIds] = {};

    bool holds(std::string_view piece) const {
      return length == piece.size() && std::memcmp(bytes, piece.data(), piece.size()) == 0;
    }
  };

  PieceCache() : entries_(size_t{1} << kBits) {}

  /// The entry where the piece is, or where it would go; piece is not empty and at most kMaxBytes
  /// long.
  Entry& at(std::string_view piece) { return entries_[hash(piece) >> (64 - kBits)]; }

 private:
  static constexpr int kBits = 15;

  static uint64_t load(const char* bytes, size_t count) {
    uint64_t word = 0;
    std::memcpy(&word, bytes, count);
    return word;
  }
  static uint64_t hash(std::string_view piece) {
    const char* data = piece.data();
    const size_t size = piece.size();
    constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15u;
    uint64_t low = 0;
    uint64_t high = 0;
    if (size >= 8) {
      low = load(data, 8);
      high = load(data + size - 8, 8);
      if (size > 16) low ^= load(data + size / 2 - 4, 8) * kMultiplier;
    } else if (size >= 4) {
      low = load(data, 4);
      high = load(data + size - 4, 4);
    } else {
      low = static_cast<uint8_t>(data[0]);
      high = load(data + size / 2, 1) << 8 | static_cast<uint8_t>(data[size - 1]);
    }
    uint64_t mixed = (low ^ size) * kMultiplier;
    mixed = (std::rotl(mixed, 29) ^ high) * 0xD6E8FEB86659FD93u;
    return mixed ^ mixed << 21;
  }

  std::vector<Entry> entries_;
};
static_assert(sizeof(PieceCache::Entry) == 64);

}  // namespace hadal::text
