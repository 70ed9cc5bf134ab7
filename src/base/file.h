// Files as hadal uses them: mapped for reading, and written whole or not at all.
//
// A durable file is written to a temporary name in its own folder, synced, renamed over the target,
// and the folder is synced; a reader sees the old content or the new one, also after SIGKILL or a
// power cut. All failures are InputErrors that name the path and the system's reason.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace hadal {

/// A file mapped read-only for the lifetime of the object. A file that another process truncates
/// while it is mapped ends in SIGBUS; files replaced by rename (as this unit does) are safe.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  /// Bytes from `offset` on, by reading instead of through the mapping, which costs a fault a page;
  /// from any thread. InputError for what the file does not hold (any more).
  void read(size_t offset, std::span<std::byte> to) const;
  const std::string& path() const { return path_; }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
  int fd_ = -1;
  std::string path_;
};

/// The whole content of a regular file; an InputError when it is larger than `max_bytes`.
std::string read_file(const std::string& path, int64_t max_bytes = int64_t{1} << 32);

/// A file that appears under its name only by commit(). Destroyed without it, nothing is left.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  /// Syncs, closes, renames and syncs the folder. At most once, and last.
  void commit();

 private:
  std::string path_, temporary_;
  int fd_ = -1;
};

/// Bytes on their way to a file that are more than memory should hold: written one behind the
/// other, read once. Nameless, so that nothing is left behind however the process ends.
class SpillFile {
 public:
  /// In the folder `folder`. Errors: InputError naming it.
  explicit SpillFile(const std::string& folder);
  ~SpillFile();
  SpillFile(const SpillFile&) = delete;
  SpillFile& operator=(const SpillFile&) = delete;

  void write(std::span<const std::byte> bytes);
  int64_t size() const { return size_; }
  /// All of it behind what `file` has.
  void append_to(AtomicFile& file) const;

 private:
  std::string folder_;
  int fd_ = -1;
  int64_t size_ = 0;
};

/// Replaces `path` by a file with this content, atomically.
void write_file_atomic(const std::string& path, std::string_view content);

/// Makes renames and new entries inside a folder durable.
void sync_directory(const std::string& path);

/// A folder that appears under its name only by commit(): files are written below temporary(),
/// which lies beside the target. The target must not exist before, or be an empty folder. Destroyed
/// without commit(), nothing is left.
class AtomicDirectory {
 public:
  explicit AtomicDirectory(const std::string& path);
  ~AtomicDirectory();
  AtomicDirectory(const AtomicDirectory&) = delete;
  AtomicDirectory& operator=(const AtomicDirectory&) = delete;

  const std::string& temporary() const { return temporary_; }
  void commit();

 private:
  void make_temporary();

  std::string path_, temporary_;
  int lock_ = -1;  ///< held on the temporary folder while this process works in it
};

/// An advisory lock on a file (created when absent), held for the lifetime of the object. It is
/// released by the system when the process dies.
class FileLock {
 public:
  /// An InputError naming the path when another process or object holds the lock.
  explicit FileLock(const std::string& path);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int fd_ = -1;
};

}  // namespace hadal
