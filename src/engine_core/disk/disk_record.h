// The records of the disk prefix store (docs/kv_cache_disk.md), little-endian. Bytes that any fault
// may have changed either are a record that says what it was written to say, or no record.
//
//   offset  bytes        field
//        0      4        "HDPR"
//        4      2        version, 1
//        6      1        kind
//        7      1        0
//        8      8        pos, the tokens of the prefix
//       16      4        n, token ids that follow
//       20      4        0
//       24      8        payload bytes
//       32     32        digest of the prefix (prefix_key.h), of a text its name's
//       64     4n        the last n token ids of the prefix
//  64 + 4n  payload      the caller's bytes
//      end      8        XXH3 (64 bits) of all bytes before
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "engine_core/prefix/prefix_key.h"

namespace hadal::engine_core {

enum class RecordKind : uint8_t { kPage = 0, kWindow = 1, kSnapshot = 2, kText = 3 };
inline constexpr int kRecordKinds = 4;

struct Record {
  RecordKind kind = RecordKind::kPage;
  int64_t pos = 0;
  PrefixDigest digest{};
  std::span<const std::byte> tokens;   ///< 32-bit ids as bytes, of no alignment
  std::span<const std::byte> payload;  ///< both inside the parsed bytes
};

struct ParsedRecord {
  std::optional<Record> record;
  const char* fault = "";  ///< why there is none
};

/// `page` are the last token ids of the prefix, each in [0, 2^31).
std::string encode_record(RecordKind kind,
                          int64_t pos,
                          const PrefixDigest& digest,
                          std::span<const int64_t> page,
                          std::span<const std::byte> payload);
ParsedRecord parse_record(std::span<const std::byte> bytes);
bool same_tokens(const Record& record, std::span<const int64_t> page);
int64_t record_bytes(int64_t num_tokens, int64_t payload_bytes);

/// What the store must know of a record without reading it: written in the same batch.
struct IndexEntry {
  int64_t pos = 0;
  int64_t bytes = 0;       ///< of the record
  uint64_t last_used = 0;  ///< on the store's own clock, which counts uses
  friend bool operator==(const IndexEntry&, const IndexEntry&) = default;
};
std::string encode_index_entry(const IndexEntry& entry);
std::optional<IndexEntry> parse_index_entry(std::span<const std::byte> bytes);

/// The checksum that ends both.
uint64_t record_checksum(std::span<const std::byte> bytes);

}  // namespace hadal::engine_core
