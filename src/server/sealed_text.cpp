#include "server/sealed_text.h"

#include <algorithm>
#include <cstdint>
#include <openssl/evp.h>
#include <zlib.h>

#include "text/utf8.h"

namespace hadal::server {
namespace {

constexpr std::string_view kMark = "hadal1.";
constexpr size_t kChecksumBytes = 4;

std::string checksum(std::string_view text) {
  const auto sum =
      crc32(0, reinterpret_cast<const Bytef*>(text.data()), static_cast<uInt>(text.size()));
  std::string out;
  for (size_t i = 0; i < kChecksumBytes; ++i) out += static_cast<char>((sum >> (8 * i)) & 0xff);
  return out;
}

}  // namespace

std::string seal_text(std::string_view text) {
  const std::string plain = checksum(text) + std::string(text);
  std::string out(kMark);
  out.resize(kMark.size() + (plain.size() + 2) / 3 * 4 + 1);  // and a zero that goes again
  const int size = EVP_EncodeBlock(reinterpret_cast<uint8_t*>(out.data() + kMark.size()),
                                   reinterpret_cast<const uint8_t*>(plain.data()),
                                   static_cast<int>(plain.size()));
  out.resize(kMark.size() + static_cast<size_t>(size));
  return out;
}

std::optional<std::string> unseal_text(std::string_view sealed) {
  if (!sealed.starts_with(kMark)) return {};
  sealed.remove_prefix(kMark.size());
  if (sealed.size() % 4 != 0) return {};
  std::string plain(sealed.size() / 4 * 3, '\0');
  const int size = EVP_DecodeBlock(reinterpret_cast<uint8_t*>(plain.data()),
                                   reinterpret_cast<const uint8_t*>(sealed.data()),
                                   static_cast<int>(sealed.size()));
  if (size < 0) return {};
  // OpenSSL counts the bytes of the padding, too.
  const size_t padding = sealed.ends_with("==") ? 2 : sealed.ends_with('=') ? 1 : 0;
  plain.resize(static_cast<size_t>(size) - std::min(padding, static_cast<size_t>(size)));
  if (plain.size() < kChecksumBytes) return {};
  std::string text = plain.substr(kChecksumBytes);
  if (checksum(text) != plain.substr(0, kChecksumBytes)) return {};
  return text::repair_utf8(text);
}

}  // namespace hadal::server
