#include "engine_core/disk/disk_record.h"

#include <bit>
#include <cstring>
#include <limits>
#include <xxhash.h>

#include "base/check.h"

namespace hadal::engine_core {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr char kMagic[4] = {'H', 'D', 'P', 'R'};
constexpr uint16_t kVersion = 1;
constexpr size_t kHeaderBytes = 64;
constexpr size_t kChecksumBytes = 8;
constexpr uint8_t kIndexVersion = 1;
constexpr size_t kIndexBytes = 8 + 3 * 8 + kChecksumBytes;

template <typename T>
void append(std::string& out, const T& value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

template <typename T>
T read_at(std::span<const std::byte> bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(value));
  return value;
}

void append_checksum(std::string& out) {
  append(out, record_checksum(std::as_bytes(std::span(out))));
}

bool checksum_holds(std::span<const std::byte> bytes) {
  const size_t end = bytes.size() - kChecksumBytes;
  return read_at<uint64_t>(bytes, end) == record_checksum(bytes.first(end));
}

}  // namespace

uint64_t record_checksum(std::span<const std::byte> bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

int64_t record_bytes(int64_t num_tokens, int64_t payload_bytes) {
  return static_cast<int64_t>(kHeaderBytes + kChecksumBytes) + 4 * num_tokens + payload_bytes;
}

std::string encode_record(RecordKind kind,
                          int64_t pos,
                          const PrefixDigest& digest,
                          std::span<const int64_t> page,
                          std::span<const std::byte> payload) {
  std::string out;
  out.reserve(static_cast<size_t>(
      record_bytes(static_cast<int64_t>(page.size()), static_cast<int64_t>(payload.size()))));
  out.append(kMagic, sizeof(kMagic));
  append(out, kVersion);
  append(out, kind);
  append(out, uint8_t{0});
  append(out, pos);
  append(out, static_cast<uint32_t>(page.size()));
  append(out, uint32_t{0});
  append(out, static_cast<uint64_t>(payload.size()));
  append(out, digest);
  for (const int64_t token : page) {
    HADAL_CHECK(token >= 0 && token <= std::numeric_limits<int32_t>::max(), "disk_record: token ",
                token);
    append(out, static_cast<uint32_t>(token));
  }
  out.append(reinterpret_cast<const char*>(payload.data()), payload.size());
  append_checksum(out);
  return out;
}

ParsedRecord parse_record(std::span<const std::byte> bytes) {
  if (bytes.size() < kHeaderBytes + kChecksumBytes) return {{}, "truncated"};
  if (std::memcmp(bytes.data(), kMagic, sizeof(kMagic)) != 0) return {{}, "not a record"};
  if (read_at<uint16_t>(bytes, 4) != kVersion) return {{}, "of another version"};
  if (!checksum_holds(bytes)) return {{}, "wrong checksum"};
  const auto kind = read_at<uint8_t>(bytes, 6);
  const auto pos = read_at<int64_t>(bytes, 8);
  const uint64_t tokens = read_at<uint32_t>(bytes, 16);
  const auto payload = read_at<uint64_t>(bytes, 24);
  const uint64_t body = bytes.size() - kHeaderBytes - kChecksumBytes;
  if (kind >= kRecordKinds || read_at<uint8_t>(bytes, 7) != 0 || read_at<uint32_t>(bytes, 20) != 0)
    return {{}, "unknown kind"};
  if (4 * tokens > body || payload != body - 4 * tokens) return {{}, "sizes do not add up"};
  if (pos < 0 || static_cast<uint64_t>(pos) < tokens) return {{}, "impossible position"};
  Record record;
  record.kind = static_cast<RecordKind>(kind);
  record.pos = pos;
  record.digest = read_at<PrefixDigest>(bytes, 32);
  record.tokens = bytes.subspan(kHeaderBytes, static_cast<size_t>(4 * tokens));
  record.payload =
      bytes.subspan(kHeaderBytes + static_cast<size_t>(4 * tokens), static_cast<size_t>(payload));
  return {record, ""};
}

bool same_tokens(const Record& record, std::span<const int64_t> page) {
  if (record.tokens.size() != 4 * page.size()) return false;
  for (size_t i = 0; i < page.size(); ++i) {
    if (int64_t{read_at<uint32_t>(record.tokens, 4 * i)} != page[i]) return false;
  }
  return true;
}

std::string encode_index_entry(const IndexEntry& entry) {
  std::string out(8, '\0');
  out[0] = kIndexVersion;
  append(out, entry.pos);
  append(out, entry.bytes);
  append(out, entry.last_used);
  append_checksum(out);
  return out;
}

std::optional<IndexEntry> parse_index_entry(std::span<const std::byte> bytes) {
  if (bytes.size() != kIndexBytes || read_at<uint64_t>(bytes, 0) != kIndexVersion ||
      !checksum_holds(bytes))
    return std::nullopt;
  const IndexEntry entry{read_at<int64_t>(bytes, 8), read_at<int64_t>(bytes, 16),
                         read_at<uint64_t>(bytes, 24)};
  if (entry.pos < 0 || entry.bytes < 0) return std::nullopt;
  return entry;
}

}  // namespace hadal::engine_core
