#include "base/event_file.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <filesystem>

#include <fmt/format.h>

namespace hadal {
namespace {

constexpr const char* kPrefix = "events.out.tfevents.";

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82F63B78u : 0u);
    table[byte] = crc;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kCrcTable = make_table();

/// As TFRecord stores checksums, so that a checksum of data with checksums in them stays telling.
uint32_t masked_crc(std::string_view bytes) { return std::rotr(crc32c(bytes), 15) + 0xA282EAD8u; }

template <typename Unsigned>
void append_little_endian(std::string& out, Unsigned value) {
  for (size_t i = 0; i < sizeof(Unsigned); ++i) {
    out += static_cast<char>(static_cast<unsigned char>(value >> (8 * i)));
  }
}

// Protocol buffers, as far as Event needs them: a key is field * 8 + wire type.
enum Wire : uint64_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

void append_varint(std::string& out, uint64_t value) {
  for (; value >= 128; value >>= 7) out += static_cast<char>((value & 127) | 128);
  out += static_cast<char>(value);
}
void append_key(std::string& out, uint64_t field, Wire wire) {
  append_varint(out, field * 8 + wire);
}
void append_bytes(std::string& out, uint64_t field, std::string_view bytes) {
  append_key(out, field, kBytes);
  append_varint(out, bytes.size());
  out += bytes;
}

/// Event{wall_time = 1, step = 2}; what happened follows.
std::string event(double wall_time, int64_t step) {
  std::string out;
  append_key(out, 1, kFixed64);
  append_little_endian(out, std::bit_cast<uint64_t>(wall_time));
  append_key(out, 2, kVarint);
  append_varint(out, static_cast<uint64_t>(step));
  return out;
}

constexpr size_t kFrame = 16;  // bytes of a record around its data

uint64_t read_little_endian(std::string_view bytes, size_t count) {
  uint64_t value = 0;
  for (size_t i = 0; i < count; ++i)
    value |= uint64_t{static_cast<unsigned char>(bytes[i])} << (8 * i);
  return value;
}

/// The step of an Event as event() writes it, behind the time; 0 when there is none.
int64_t step_of(std::string_view data) {
  constexpr size_t kTime = 9;
  if (data.size() <= kTime || data[0] != 1 * 8 + kFixed64 || data[kTime] != 2 * 8 + kVarint)
    return 0;
  uint64_t step = 0;
  int shift = 0;
  for (size_t i = kTime + 1; i < data.size() && shift < 64; ++i, shift += 7) {
    const auto byte = static_cast<unsigned char>(data[i]);
    step |= uint64_t{byte & 127u} << shift;
    if (byte < 128) break;
  }
  return static_cast<int64_t>(step);
}

}  // namespace

uint32_t crc32c(std::string_view bytes) {
  uint32_t crc = 0xFFFFFFFFu;
  for (const char c : bytes) {
    crc = (crc >> 8) ^ kCrcTable[(crc ^ static_cast<unsigned char>(c)) & 255u];
  }
  return ~crc;
}

std::string tfrecord(std::string_view data) {
  std::string out;
  append_little_endian(out, static_cast<uint64_t>(data.size()));
  append_little_endian(out, masked_crc(out));
  out += data;
  append_little_endian(out, masked_crc(data));
  return out;
}

std::string event_file_head(double wall_time, int64_t step) {
  std::string version = event(wall_time, 0);
  append_bytes(version, 3, "brain.Event:2");  // file_version
  std::string session;
  append_key(session, 1, kVarint);  // status
  append_varint(session, 1);        // START
  std::string start = event(wall_time, step);
  append_bytes(start, 7, session);  // session_log
  return tfrecord(version) + tfrecord(start);
}

std::string scalar_event(double wall_time, int64_t step, const Scalars& scalars) {
  std::string summary;
  for (const auto& [tag, number] : scalars) {
    std::string value;
    append_bytes(value, 1, tag);
    append_key(value, 2, kFixed32);  // simple_value
    append_little_endian(value, std::bit_cast<uint32_t>(static_cast<float>(number)));
    append_bytes(summary, 1, value);
  }
  std::string out = event(wall_time, step);
  append_bytes(out, 5, summary);
  return tfrecord(out);
}

size_t kept_event_bytes(std::string_view file, int64_t last_step) {
  size_t kept = 0;
  while (file.size() - kept >= kFrame) {
    const std::string_view rest = file.substr(kept);
    const auto length = read_little_endian(rest, 8);
    if (read_little_endian(rest.substr(8), 4) != masked_crc(rest.substr(0, 8))) break;
    if (length > rest.size() - kFrame) break;
    const std::string_view data = rest.substr(12, length);
    if (read_little_endian(rest.substr(12 + length), 4) != masked_crc(data)) break;
    if (step_of(data) > last_step) break;
    kept += kFrame + length;
  }
  return kept;
}

std::string event_file_name(int64_t seconds) {
  return fmt::format("{}{:010}.hadal", kPrefix, seconds);
}

std::vector<std::string> event_files(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(kPrefix)) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace hadal
