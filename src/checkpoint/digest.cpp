#include "checkpoint/digest.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <span>
#include <vector>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/check.h"
#include "base/file.h"

namespace hadal::checkpoint {
namespace {

constexpr size_t kMiB = size_t{1} << 20, kWhole = 1024 * kMiB, kHead = 16 * kMiB,
                 kStride = 64 * kMiB;

struct State {
  XXH3_state_t state;
  void add(std::span<const std::byte> bytes) {
    XXH3_128bits_update(&state, bytes.data(), bytes.size());
  }
};

}  // namespace

std::string weights_digest(const std::string& folder) {
  std::vector<std::string> paths = {folder + "/config.json"};
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (entry.path().extension() == ".safetensors") paths.push_back(entry.path().string());
  }
  HADAL_INPUT_CHECK(!error, folder, ": ", error.message());
  std::sort(paths.begin(), paths.end());
  State hash;
  XXH3_128bits_reset(&hash.state);
  for (const std::string& path : paths) {
    const MappedFile file(path);
    const std::span<const std::byte> bytes = file.bytes();
    const uint64_t size = bytes.size();
    hash.add(std::as_bytes(std::span(&size, 1)));
    if (bytes.size() <= kWhole) {
      hash.add(bytes);
      continue;
    }
    hash.add(bytes.first(kHead));
    for (size_t at = kHead; at < bytes.size(); at += kStride)
      hash.add(bytes.subspan(at, std::min(kMiB, bytes.size() - at)));
  }
  const XXH128_hash_t value = XXH3_128bits_digest(&hash.state);
  char text[33];
  std::snprintf(text, sizeof(text), "%016llx%016llx", static_cast<unsigned long long>(value.high64),
                static_cast<unsigned long long>(value.low64));
  return text;
}

}  // namespace hadal::checkpoint
