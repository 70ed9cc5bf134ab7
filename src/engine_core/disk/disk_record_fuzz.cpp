// libFuzzer target: any bytes, as they are and with a checksum that holds, are no record or one
// that encodes to the same bytes.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine_core/disk/disk_record.h"

namespace {

namespace engine_core = hadal::engine_core;

bool equal(const std::string& encoded, std::span<const std::byte> bytes) {
  return encoded.size() == bytes.size() &&
         std::memcmp(encoded.data(), bytes.data(), bytes.size()) == 0;
}

void check(std::span<const std::byte> bytes) {
  const engine_core::ParsedRecord parsed = engine_core::parse_record(bytes);
  if (parsed.record.has_value() == !std::string_view(parsed.fault).empty()) std::abort();
  if (parsed.record) {
    const engine_core::Record& record = *parsed.record;
    std::vector<int64_t> tokens(record.tokens.size() / 4);
    bool storable = true;
    for (size_t i = 0; i < tokens.size(); ++i) {
      uint32_t token = 0;
      std::memcpy(&token, record.tokens.data() + 4 * i, 4);
      tokens[i] = token;
      storable = storable && token <= 0x7fffffffu;
    }
    if (!engine_core::same_tokens(record, tokens)) std::abort();
    if (storable && !equal(engine_core::encode_record(record.kind, record.pos, record.digest,
                                                      tokens, record.payload),
                           bytes))
      std::abort();
  }
  if (const auto entry = engine_core::parse_index_entry(bytes)) {
    if (!equal(engine_core::encode_index_entry(*entry), bytes)) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  check(std::as_bytes(std::span(data, size)));
  if (size < 8) return 0;
  std::vector<uint8_t> sealed(data, data + size);
  const uint64_t checksum =
      engine_core::record_checksum(std::as_bytes(std::span(sealed)).first(size - 8));
  std::memcpy(sealed.data() + size - 8, &checksum, 8);
  check(std::as_bytes(std::span(sealed)));
  // The magic and the version too, which a fuzzer takes long to guess.
  if (size < 16) return 0;
  std::memcpy(sealed.data(), "HDPR\1\0", 6);
  const uint64_t again =
      engine_core::record_checksum(std::as_bytes(std::span(sealed)).first(size - 8));
  std::memcpy(sealed.data() + size - 8, &again, 8);
  check(std::as_bytes(std::span(sealed)));
  return 0;
}
