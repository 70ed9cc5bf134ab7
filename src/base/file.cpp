#include "base/file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "base/check.h"

namespace hadal {
namespace {

[[noreturn]] void fail(const std::string& path, const char* action) {
  const int reason = errno;
  throw InputError(concat(path, ": cannot ", action, ": ", std::strerror(reason)));
}

/// Closes a descriptor when a scope is left.
struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

/// Opens for reading and returns the size; folders, devices and pipes are refused.
int64_t open_regular(const std::string& path, Descriptor& file) {
  // O_NONBLOCK: opening a pipe must not hang; it has no effect on regular files.
  file.fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file.fd < 0) fail(path, "open");
  struct stat status {};
  if (::fstat(file.fd, &status) != 0) fail(path, "stat");
  HADAL_INPUT_CHECK(S_ISREG(status.st_mode), path, ": is not a regular file");
  return static_cast<int64_t>(status.st_size);
}

std::string parent_of(const std::string& path) {
  const auto parent = std::filesystem::path(path).parent_path();
  return parent.empty() ? "." : parent.string();
}

/// A path without trailing slashes, so that a name can be appended.
std::string stripped(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

void write_all(int fd, const std::byte* data, size_t size, const std::string& path) {
  while (size > 0) {
    const ssize_t done = ::write(fd, data, std::min<size_t>(size, size_t{1} << 30));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail(path, "write");
    data += done;
    size -= static_cast<size_t>(done);
  }
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  Descriptor file{-1};
  size_ = static_cast<size_t>(open_regular(path, file));
  if (size_ == 0) return;  // an empty range cannot be mapped
  void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (address == MAP_FAILED) fail(path, "map");
  data_ = static_cast<const std::byte*>(address);
  fd_ = std::exchange(file.fd, -1);
}

void MappedFile::read(size_t offset, std::span<std::byte> to) const {
  HADAL_INPUT_CHECK(offset <= size_ && to.size() <= size_ - offset, path_, ": has ", size_,
                    " bytes, asked for ", to.size(), " from ", offset, " on");
  while (!to.empty()) {
    const ssize_t got = ::pread(fd_, to.data(), to.size(), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(path_, "read");
    HADAL_INPUT_CHECK(got > 0, path_, ": became shorter while it was read");
    offset += static_cast<size_t>(got);
    to = to.subspan(static_cast<size_t>(got));
  }
}

MappedFile::~MappedFile() {
  if (fd_ >= 0) ::close(fd_);
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(fd_, other.fd_);
  std::swap(path_, other.path_);
  return *this;
}

std::string read_file(const std::string& path, int64_t max_bytes) {
  Descriptor file{-1};
  const int64_t size = open_regular(path, file);
  HADAL_INPUT_CHECK(size <= max_bytes, path, ": has ", size, " bytes, at most ", max_bytes,
                    " are read");
  std::string content(static_cast<size_t>(size), '\0');
  size_t done = 0;
  while (done < content.size()) {
    const ssize_t got = ::read(file.fd, content.data() + done, content.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(path, "read");
    HADAL_INPUT_CHECK(got > 0, path, ": became shorter while it was read");
    done += static_cast<size_t>(got);
  }
  return content;
}

AtomicFile::AtomicFile(const std::string& path)
    : path_(path), temporary_(concat(path, ".tmp-XXXXXX")) {
  fd_ = ::mkostemp(temporary_.data(), O_CLOEXEC);
  if (fd_ < 0) fail(path, "create a temporary file beside it");
  // mkostemp gives 0600; the target gets what an ordinary new file would have.
  const mode_t mask = ::umask(0);
  ::umask(mask);
  ::fchmod(fd_, 0666 & ~mask);
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) {
    ::close(fd_);
    ::unlink(temporary_.c_str());
  }
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  HADAL_CHECK(fd_ >= 0, "AtomicFile: ", path_, " is already committed");
  write_all(fd_, bytes.data(), bytes.size(), temporary_);
}

void AtomicFile::write(std::string_view text) { write(std::as_bytes(std::span(text))); }

void AtomicFile::commit() {
  HADAL_CHECK(fd_ >= 0, "AtomicFile: ", path_, " is already committed");
  if (::fsync(fd_) != 0) fail(temporary_, "sync");
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail(path_, "replace");
  ::close(std::exchange(fd_, -1));
  sync_directory(parent_of(path_));
}

SpillFile::SpillFile(const std::string& folder) : folder_(folder) {
  std::string name = folder + "/spill.tmp-XXXXXX";
  fd_ = ::mkostemp(name.data(), O_CLOEXEC);
  if (fd_ < 0) fail(folder, "create a temporary file in it");
  ::unlink(name.c_str());
}

SpillFile::~SpillFile() {
  if (fd_ >= 0) ::close(fd_);
}

void SpillFile::write(std::span<const std::byte> bytes) {
  write_all(fd_, bytes.data(), bytes.size(), folder_);
  size_ += static_cast<int64_t>(bytes.size());
}

void SpillFile::append_to(AtomicFile& file) const {
  std::vector<std::byte> buffer(static_cast<size_t>(std::min<int64_t>(size_, int64_t{8} << 20)));
  for (int64_t at = 0; at < size_;) {
    const ssize_t got = ::pread(fd_, buffer.data(), buffer.size(), at);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) fail(folder_, "read a temporary file in it");
    file.write(std::span(buffer).first(static_cast<size_t>(got)));
    at += got;
  }
}

void write_file_atomic(const std::string& path, std::string_view content) {
  AtomicFile file(path);
  file.write(content);
  file.commit();
}

void sync_directory(const std::string& path) {
  Descriptor directory{::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  if (directory.fd < 0) fail(path, "open the folder");
  // Some file systems cannot sync folders and say EINVAL; there is nothing more to do on those.
  if (::fsync(directory.fd) != 0 && errno != EINVAL) fail(path, "sync the folder");
}

namespace {

/// Opens a folder and locks it; -1 when it is gone or another process works in it.
int lock_folder(const std::string& path) {
  Descriptor folder{::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  if (folder.fd < 0) return -1;
  // File systems without locks: nobody can be told from the dead, so nothing is taken for dead.
  if (::flock(folder.fd, LOCK_EX | LOCK_NB) != 0) return -1;
  struct stat open {
  }, named{};
  const bool same = ::fstat(folder.fd, &open) == 0 && ::stat(path.c_str(), &named) == 0 &&
                    open.st_ino == named.st_ino && open.st_dev == named.st_dev;
  return same ? std::exchange(folder.fd, -1) : -1;
}

/// Removes the temporary folders that killed processes left beside `path`: those whose lock nobody
/// holds.
void remove_abandoned(const std::string& path) {
  const std::string mark = std::filesystem::path(path).filename().string() + ".tmp-";
  std::error_code ignored;
  std::vector<std::string> abandoned;
  for (std::filesystem::directory_iterator entry(parent_of(path), ignored), end; entry != end;
       entry.increment(ignored)) {
    const std::string name = entry->path().filename().string();
    if (name.size() == mark.size() + 6 && name.starts_with(mark))
      abandoned.push_back(entry->path().string());
  }
  for (const std::string& folder : abandoned) {
    const Descriptor lock{lock_folder(folder)};
    if (lock.fd >= 0) std::filesystem::remove_all(folder, ignored);
  }
}

}  // namespace

AtomicDirectory::AtomicDirectory(const std::string& path) : path_(stripped(path)) {
  std::error_code ignored;
  HADAL_INPUT_CHECK(
      !std::filesystem::exists(path_, ignored) || (std::filesystem::is_directory(path_, ignored) &&
                                                   std::filesystem::is_empty(path_, ignored)),
      path_, ": exists and is not an empty folder");
  remove_abandoned(path_);
  make_temporary();
  const mode_t mask = ::umask(0);
  ::umask(mask);
  ::chmod(temporary_.c_str(), 0777 & ~mask);
}

void AtomicDirectory::make_temporary() {
  // Another process may take the new folder for abandoned before it is locked: then once more.
  for (int attempt = 0; attempt < 10 && lock_ < 0; ++attempt) {
    if (!temporary_.empty()) ::rmdir(temporary_.c_str());
    temporary_ = concat(path_, ".tmp-XXXXXX");
    if (::mkdtemp(temporary_.data()) == nullptr) fail(path_, "create a temporary folder beside it");
    lock_ = lock_folder(temporary_);
  }
}

AtomicDirectory::~AtomicDirectory() {
  std::error_code ignored;
  if (!temporary_.empty()) std::filesystem::remove_all(temporary_, ignored);
  if (lock_ >= 0) ::close(lock_);
}

void AtomicDirectory::commit() {
  HADAL_CHECK(!temporary_.empty(), "AtomicDirectory: ", path_, " is already committed");
  sync_directory(temporary_);
  // rename() replaces an empty folder and refuses any other.
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail(path_, "create");
  temporary_.clear();
  sync_directory(parent_of(path_));
}

FileLock::FileLock(const std::string& path) {
  Descriptor file{::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)};
  if (file.fd < 0) fail(path, "open");
  while (::flock(file.fd, LOCK_EX | LOCK_NB) != 0) {
    HADAL_INPUT_CHECK(errno != EWOULDBLOCK, path, ": is locked by another process");
    if (errno != EINTR) fail(path, "lock");
  }
  fd_ = std::exchange(file.fd, -1);
}

FileLock::~FileLock() {
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace hadal
