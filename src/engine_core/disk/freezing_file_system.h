// A file system under RocksDB whose first failed write is its last.
//
// RocksDB does not survive every failed write: what it does with the file afterwards ends the
// process where its assertions are on (Debian's), and may be taken for damage elsewhere. So it gets
// to see none: from the first change of a file that the system refuses, nothing on disk changes any
// more and RocksDB is told that all went well. To the files this is a SIGKILL at that moment, which
// they are made to survive; whoever uses the database asks failed() after each write and closes it.
// Reads of what was never written fail or come short. Thread-safe.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <rocksdb/file_system.h>
#include <string>

namespace hadal::engine_core {

class FreezingFileSystem final : public rocksdb::FileSystemWrapper {
 public:
  explicit FreezingFileSystem(std::shared_ptr<rocksdb::FileSystem> target)
      : FileSystemWrapper(std::move(target)) {}
  const char* Name() const override { return "FreezingFileSystem"; }

  bool failed() const { return failed_.load(std::memory_order_acquire); }
  /// What the system said; empty unless failed().
  std::string reason() const;
  /// Files may change again: only while nothing is open.
  void thaw();
  /// Bytes that can still be written below `path`; a lot where nobody knows.
  uint64_t free_bytes(const std::string& path);

  /// Does `change`, unless frozen; freezes where it fails.
  template <typename Change>
  rocksdb::IOStatus change(const Change& change) {
    if (failed()) return rocksdb::IOStatus::OK();
    const rocksdb::IOStatus status = change();
    // Asked for and not there is an answer, not a refusal.
    if (status.ok() || status.IsNotFound() || status.IsPathNotFound() || status.IsNotSupported())
      return status;
    freeze(status);
    return rocksdb::IOStatus::OK();
  }

  using Options = rocksdb::IOOptions;
  using Debug = rocksdb::IODebugContext;
  rocksdb::IOStatus NewWritableFile(const std::string& name,
                                    const rocksdb::FileOptions& options,
                                    std::unique_ptr<rocksdb::FSWritableFile>* result,
                                    Debug* debug) override;
  rocksdb::IOStatus ReopenWritableFile(const std::string& name,
                                       const rocksdb::FileOptions& options,
                                       std::unique_ptr<rocksdb::FSWritableFile>* result,
                                       Debug* debug) override;
  rocksdb::IOStatus ReuseWritableFile(const std::string& name,
                                      const std::string& old_name,
                                      const rocksdb::FileOptions& options,
                                      std::unique_ptr<rocksdb::FSWritableFile>* result,
                                      Debug* debug) override;
  rocksdb::IOStatus NewDirectory(const std::string& name,
                                 const Options& options,
                                 std::unique_ptr<rocksdb::FSDirectory>* result,
                                 Debug* debug) override;
  rocksdb::IOStatus DeleteFile(const std::string& name,
                               const Options& options,
                               Debug* debug) override;
  rocksdb::IOStatus Truncate(const std::string& name,
                             size_t size,
                             const Options& options,
                             Debug* debug) override;
  rocksdb::IOStatus CreateDirIfMissing(const std::string& name,
                                       const Options& options,
                                       Debug* debug) override;
  rocksdb::IOStatus DeleteDir(const std::string& name,
                              const Options& options,
                              Debug* debug) override;
  rocksdb::IOStatus RenameFile(const std::string& from,
                               const std::string& to,
                               const Options& options,
                               Debug* debug) override;
  rocksdb::IOStatus LinkFile(const std::string& from,
                             const std::string& to,
                             const Options& options,
                             Debug* debug) override;

 private:
  void freeze(const rocksdb::IOStatus& status);
  template <typename Make>
  rocksdb::IOStatus make_file(std::unique_ptr<rocksdb::FSWritableFile>* result, const Make& make);

  std::atomic<bool> failed_{false};
  mutable std::mutex mutex_;
  std::string reason_;
};

}  // namespace hadal::engine_core
