// A file that several processes write together, each at places of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace hadal {

/// All failures are InputErrors that name the path and the system's reason.
class PlacedFile {
 public:
  enum Mode { kCreate, kOpen };
  PlacedFile(const std::string& path, Mode mode);
  ~PlacedFile();
  PlacedFile(const PlacedFile&) = delete;
  PlacedFile& operator=(const PlacedFile&) = delete;

  void resize(int64_t bytes);
  void write(int64_t at, std::span<const std::byte> bytes);
  /// What this process wrote is durable afterwards.
  void sync();

 private:
  [[noreturn]] void fail(const char* action) const;

  std::string path_;
  int fd_ = -1;
};

}  // namespace hadal
