#include "base/placed_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <unistd.h>

#include "base/check.h"

namespace hadal {

PlacedFile::PlacedFile(const std::string& path, Mode mode)
    : path_(path),
      fd_(::open(path.c_str(),
                 mode == kCreate ? O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC : O_WRONLY | O_CLOEXEC,
                 0666)) {
  if (fd_ < 0) fail(mode == kCreate ? "create" : "open");
}

PlacedFile::~PlacedFile() {
  if (fd_ >= 0) ::close(fd_);
}

void PlacedFile::resize(int64_t bytes) {
  if (::ftruncate(fd_, bytes) != 0) fail("resize");
}

void PlacedFile::write(int64_t at, std::span<const std::byte> bytes) {
  constexpr size_t kMost = size_t{1} << 30;  // of one call to the system
  while (!bytes.empty()) {
    const ssize_t done = ::pwrite(fd_, bytes.data(), std::min(bytes.size(), kMost), at);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) fail("write");
    at += done;
    bytes = bytes.subspan(static_cast<size_t>(done));
  }
}

void PlacedFile::sync() {
  if (::fsync(fd_) != 0) fail("sync");
}

void PlacedFile::fail(const char* action) const {
  throw InputError(concat(path_, ": cannot ", action, ": ", std::strerror(errno)));
}

}  // namespace hadal
