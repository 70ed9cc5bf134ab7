#include "engine_core/disk/freezing_file_system.h"

#include <limits>
#include <utility>

namespace hadal::engine_core {
namespace {

using rocksdb::FSWritableFile;
using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;
using rocksdb::Slice;

/// What is written once nothing is written any more.
class NowhereFile final : public FSWritableFile {
 public:
  using FSWritableFile::Append;
  IOStatus Append(const Slice& data, const IOOptions& /*options*/, IODebugContext*) override {
    size_ += data.size();
    return IOStatus::OK();
  }
  IOStatus Truncate(uint64_t size, const IOOptions& /*options*/, IODebugContext*) override {
    size_ = size;
    return IOStatus::OK();
  }
  IOStatus Close(const IOOptions& /*options*/, IODebugContext*) override { return IOStatus::OK(); }
  IOStatus Flush(const IOOptions& /*options*/, IODebugContext*) override { return IOStatus::OK(); }
  IOStatus Sync(const IOOptions& /*options*/, IODebugContext*) override { return IOStatus::OK(); }
  uint64_t GetFileSize(const IOOptions& /*options*/, IODebugContext*) override { return size_; }

 private:
  uint64_t size_ = 0;
};

class FreezingFile final : public rocksdb::FSWritableFileOwnerWrapper {
 public:
  FreezingFile(FreezingFileSystem& files, std::unique_ptr<FSWritableFile> file)
      : FSWritableFileOwnerWrapper(std::move(file)),
        files_(files),
        size_(target()->GetFileSize({}, nullptr)) {}

  IOStatus Append(const Slice& data, const IOOptions& options, IODebugContext* debug) override {
    size_ += data.size();
    return files_.change([&] { return target()->Append(data, options, debug); });
  }
  IOStatus Append(const Slice& data,
                  const IOOptions& options,
                  const rocksdb::DataVerificationInfo& info,
                  IODebugContext* debug) override {
    size_ += data.size();
    return files_.change([&] { return target()->Append(data, options, info, debug); });
  }
  IOStatus Truncate(uint64_t size, const IOOptions& options, IODebugContext* debug) override {
    size_ = size;
    return files_.change([&] { return target()->Truncate(size, options, debug); });
  }
  IOStatus Close(const IOOptions& options, IODebugContext* debug) override {
    if (files_.failed()) {  // RocksDB's file cuts off what was allocated ahead: that may fail
      target()->Close(options, debug).PermitUncheckedError();
      return IOStatus::OK();
    }
    return files_.change([&] { return target()->Close(options, debug); });
  }
  IOStatus Flush(const IOOptions& options, IODebugContext* debug) override {
    return files_.change([&] { return target()->Flush(options, debug); });
  }
  IOStatus Sync(const IOOptions& options, IODebugContext* debug) override {
    return files_.change([&] { return target()->Sync(options, debug); });
  }
  IOStatus Fsync(const IOOptions& options, IODebugContext* debug) override {
    return files_.change([&] { return target()->Fsync(options, debug); });
  }
  IOStatus RangeSync(uint64_t offset,
                     uint64_t bytes,
                     const IOOptions& options,
                     IODebugContext* debug) override {
    return files_.change([&] { return target()->RangeSync(offset, bytes, options, debug); });
  }
  uint64_t GetFileSize(const IOOptions& options, IODebugContext* debug) override {
    return files_.failed() ? size_ : target()->GetFileSize(options, debug);
  }

 private:
  FreezingFileSystem& files_;
  uint64_t size_;  ///< as RocksDB believes
};

class FreezingDirectory final : public rocksdb::FSDirectoryWrapper {
 public:
  FreezingDirectory(FreezingFileSystem& files, std::unique_ptr<rocksdb::FSDirectory> directory)
      : FSDirectoryWrapper(std::move(directory)), files_(files) {}
  IOStatus Fsync(const IOOptions& options, IODebugContext* debug) override {
    return files_.change([&] { return FSDirectoryWrapper::Fsync(options, debug); });
  }
  IOStatus FsyncWithDirOptions(const IOOptions& options,
                               IODebugContext* debug,
                               const rocksdb::DirFsyncOptions& directory) override {
    return files_.change(
        [&] { return FSDirectoryWrapper::FsyncWithDirOptions(options, debug, directory); });
  }

 private:
  FreezingFileSystem& files_;
};

}  // namespace

std::string FreezingFileSystem::reason() const {
  const std::lock_guard lock(mutex_);
  return reason_;
}

void FreezingFileSystem::thaw() {
  const std::lock_guard lock(mutex_);
  reason_.clear();
  failed_.store(false, std::memory_order_release);
}

void FreezingFileSystem::freeze(const IOStatus& status) {
  const std::lock_guard lock(mutex_);
  if (failed()) return;
  reason_ = status.ToString();
  failed_.store(true, std::memory_order_release);
}

uint64_t FreezingFileSystem::free_bytes(const std::string& path) {
  uint64_t bytes = 0;
  return GetFreeSpace(path, {}, &bytes, nullptr).ok() ? bytes
                                                      : std::numeric_limits<uint64_t>::max();
}

template <typename Make>
IOStatus FreezingFileSystem::make_file(std::unique_ptr<FSWritableFile>* result, const Make& make) {
  const IOStatus status = change(make);
  if (!status.ok()) return status;
  if (failed()) {
    *result = std::make_unique<NowhereFile>();
  } else {
    *result = std::make_unique<FreezingFile>(*this, std::move(*result));
  }
  return status;
}

IOStatus FreezingFileSystem::NewWritableFile(const std::string& name,
                                             const rocksdb::FileOptions& options,
                                             std::unique_ptr<FSWritableFile>* result,
                                             Debug* debug) {
  return make_file(result, [&] { return target()->NewWritableFile(name, options, result, debug); });
}

IOStatus FreezingFileSystem::ReopenWritableFile(const std::string& name,
                                                const rocksdb::FileOptions& options,
                                                std::unique_ptr<FSWritableFile>* result,
                                                Debug* debug) {
  return make_file(result,
                   [&] { return target()->ReopenWritableFile(name, options, result, debug); });
}

IOStatus FreezingFileSystem::ReuseWritableFile(const std::string& name,
                                               const std::string& old_name,
                                               const rocksdb::FileOptions& options,
                                               std::unique_ptr<FSWritableFile>* result,
                                               Debug* debug) {
  return make_file(
      result, [&] { return target()->ReuseWritableFile(name, old_name, options, result, debug); });
}

IOStatus FreezingFileSystem::NewDirectory(const std::string& name,
                                          const Options& options,
                                          std::unique_ptr<rocksdb::FSDirectory>* result,
                                          Debug* debug) {
  const IOStatus status = target()->NewDirectory(name, options, result, debug);
  if (status.ok()) *result = std::make_unique<FreezingDirectory>(*this, std::move(*result));
  return status;
}

IOStatus FreezingFileSystem::DeleteFile(const std::string& name,
                                        const Options& options,
                                        Debug* debug) {
  return change([&] { return target()->DeleteFile(name, options, debug); });
}

IOStatus FreezingFileSystem::Truncate(const std::string& name,
                                      size_t size,
                                      const Options& options,
                                      Debug* debug) {
  return change([&] { return target()->Truncate(name, size, options, debug); });
}

IOStatus FreezingFileSystem::CreateDirIfMissing(const std::string& name,
                                                const Options& options,
                                                Debug* debug) {
  return change([&] { return target()->CreateDirIfMissing(name, options, debug); });
}

IOStatus FreezingFileSystem::DeleteDir(const std::string& name,
                                       const Options& options,
                                       Debug* debug) {
  return change([&] { return target()->DeleteDir(name, options, debug); });
}

IOStatus FreezingFileSystem::RenameFile(const std::string& from,
                                        const std::string& to,
                                        const Options& options,
                                        Debug* debug) {
  return change([&] { return target()->RenameFile(from, to, options, debug); });
}

IOStatus FreezingFileSystem::LinkFile(const std::string& from,
                                      const std::string& to,
                                      const Options& options,
                                      Debug* debug) {
  return change([&] { return target()->LinkFile(from, to, options, debug); });
}

}  // namespace hadal::engine_core
