// For tests of the disk prefix store: prompts whose stored bytes follow from their tokens, so that
// anything a store returns can be checked, and a file system with faults to order.
#pragma once

#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <rocksdb/env.h>
#include <rocksdb/file_system.h>
#include <span>
#include <stdlib.h>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/hash.h"
#include "engine_core/disk/disk_store.h"

namespace hadal::testing {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    // In memory where that can be had: most of the time of a small database is fsync().
    for (const std::string& parent :
         {std::string("/dev/shm"), std::filesystem::temp_directory_path().string()}) {
      std::string pattern = parent + "/hadal_disk_XXXXXX";
      if (::mkdtemp(pattern.data()) == nullptr) continue;
      path_ = pattern;
      return;
    }
    throw std::runtime_error("no temporary folder can be made");
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline constexpr int64_t kPageTokens = 8;
inline constexpr int64_t kPageBytes = 3000, kWindowBytes = 5000, kSnapshotBytes = 1500;

inline engine_core::DiskStoreOptions disk_options(const std::string& folder,
                                                  engine_core::WindowPolicy policy) {
  engine_core::DiskStoreOptions options;
  options.folder = folder;
  options.identity = "test model";
  options.page_tokens = kPageTokens;
  options.policy = policy;
  options.period = 2 * kPageTokens;
  options.window_pages = 2;
  options.max_bytes = int64_t{64} << 20;
  options.retry = std::chrono::milliseconds(20);
  return options;
}

inline std::vector<std::byte> bytes_for(engine_core::RecordKind kind,
                                        std::span<const int64_t> prefix) {
  const int64_t size = kind == engine_core::RecordKind::kPage     ? kPageBytes
                       : kind == engine_core::RecordKind::kWindow ? kWindowBytes
                                                                  : kSnapshotBytes;
  const auto raw = std::as_bytes(prefix);
  uint64_t state = fnv1a64({reinterpret_cast<const char*>(raw.data()), raw.size()}) +
                   static_cast<uint64_t>(kind);
  std::vector<std::byte> bytes(static_cast<size_t>(size));
  for (std::byte& byte : bytes) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    byte = static_cast<std::byte>(state >> 56);
  }
  return bytes;
}

inline std::span<const int64_t> first_pages(std::span<const int64_t> tokens, int64_t pages) {
  return tokens.first(static_cast<size_t>(pages * kPageTokens));
}

/// `seed` names the prompt; prompts of one `family` share their first `shared` tokens.
inline std::vector<int64_t> prompt(uint64_t seed,
                                   int64_t pages,
                                   uint64_t family = 0,
                                   int64_t shared = 0) {
  std::vector<int64_t> tokens(static_cast<size_t>(pages * kPageTokens));
  std::mt19937_64 own(seed), common(family + 1000003);
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<int64_t>((i < static_cast<size_t>(shared) ? common() : own()) % 1000);
  return tokens;
}

/// Everything a caller offers for a prompt, page by page.
inline void save_all(engine_core::PrefixStore& store, std::span<const int64_t> tokens) {
  for (int64_t pages = 1; pages * kPageTokens <= std::ssize(tokens); ++pages) {
    const auto prefix = first_pages(tokens, pages);
    store.save_page(prefix, bytes_for(engine_core::RecordKind::kPage, prefix));
    store.save_window(prefix, bytes_for(engine_core::RecordKind::kWindow, prefix));
    store.save_snapshot(prefix, bytes_for(engine_core::RecordKind::kSnapshot, prefix));
  }
}

/// Loads and checks every byte of what comes; returns the position, 0 for a miss.
inline int64_t load_checked(engine_core::PrefixStore& store,
                            std::span<const int64_t> tokens,
                            int64_t from_page,
                            int64_t max_pos,
                            int64_t window_pages = 2) {
  const auto found = store.load(tokens, from_page, max_pos);
  if (!found) return 0;
  const int64_t pages = found->pos / kPageTokens;
  EXPECT_EQ(found->pos % kPageTokens, 0);
  EXPECT_GT(found->pos, 0);
  EXPECT_LE(found->pos, std::min(max_pos, std::ssize(tokens)));
  EXPECT_EQ(std::ssize(found->pages), std::max<int64_t>(0, pages - from_page));
  for (int64_t i = 0; i < std::ssize(found->pages); ++i)
    EXPECT_EQ(found->pages[static_cast<size_t>(i)],
              bytes_for(engine_core::RecordKind::kPage, first_pages(tokens, from_page + i + 1)));
  if (store.policy() == engine_core::WindowPolicy::kPeriodic)
    EXPECT_EQ(found->snapshot,
              bytes_for(engine_core::RecordKind::kSnapshot, first_pages(tokens, pages)));
  else
    EXPECT_TRUE(found->snapshot.empty());
  const int64_t windows =
      store.policy() == engine_core::WindowPolicy::kFull ? std::min(pages, window_pages) : 0;
  EXPECT_EQ(std::ssize(found->windows), windows);
  for (int64_t i = 0; i < std::min(windows, std::ssize(found->windows)); ++i)
    EXPECT_EQ(
        found->windows[static_cast<size_t>(i)],
        bytes_for(engine_core::RecordKind::kWindow, first_pages(tokens, pages - windows + i + 1)));
  return found->pos;
}

inline int64_t load_all(engine_core::PrefixStore& store, std::span<const int64_t> tokens) {
  return load_checked(store, tokens, 0, std::ssize(tokens));
}

/// Faults by flag; all off at first.
class FaultyFileSystem : public rocksdb::FileSystemWrapper {
 public:
  std::atomic<bool> disk_full{false};      ///< half of what is written arrives, then ENOSPC
  std::atomic<bool> read_only{false};      ///< no file can be made or written
  std::atomic<bool> short_reads{false};    ///< reads of table and blob files end early
  std::atomic<bool> flipped_reads{false};  ///< reads of table and blob files have one bit wrong
  std::atomic<bool> blocked{false};        ///< writes wait
  std::atomic<int> full_after{-1};         ///< disk_full after so many changes of files; -1: never
  std::atomic<int> writes{0};

  FaultyFileSystem() : FileSystemWrapper(rocksdb::FileSystem::Default()) {}
  const char* Name() const override { return "FaultyFileSystem"; }

  rocksdb::IOStatus NewWritableFile(const std::string& name,
                                    const rocksdb::FileOptions& options,
                                    std::unique_ptr<rocksdb::FSWritableFile>* result,
                                    rocksdb::IODebugContext* debug) override {
    if (read_only) return rocksdb::IOStatus::IOError("Read-only file system");
    if (fills_now()) return rocksdb::IOStatus::NoSpace("No space left on device");
    rocksdb::IOStatus status = target()->NewWritableFile(name, options, result, debug);
    if (status.ok()) *result = std::make_unique<Writable>(this, std::move(*result));
    return status;
  }
  rocksdb::IOStatus ReopenWritableFile(const std::string& name,
                                       const rocksdb::FileOptions& options,
                                       std::unique_ptr<rocksdb::FSWritableFile>* result,
                                       rocksdb::IODebugContext* debug) override {
    if (read_only) return rocksdb::IOStatus::IOError("Read-only file system");
    return target()->ReopenWritableFile(name, options, result, debug);
  }
  rocksdb::IOStatus RenameFile(const std::string& from,
                               const std::string& to,
                               const rocksdb::IOOptions& options,
                               rocksdb::IODebugContext* debug) override {
    if (fills_now()) return rocksdb::IOStatus::NoSpace("No space left on device");
    return target()->RenameFile(from, to, options, debug);
  }
  rocksdb::IOStatus NewRandomAccessFile(const std::string& name,
                                        const rocksdb::FileOptions& options,
                                        std::unique_ptr<rocksdb::FSRandomAccessFile>* result,
                                        rocksdb::IODebugContext* debug) override {
    rocksdb::IOStatus status = target()->NewRandomAccessFile(name, options, result, debug);
    if (status.ok()) *result = std::make_unique<Readable>(this, std::move(*result));
    return status;
  }

  /// Counts a change; with disk_full new files have no place either where `full_after` is used.
  bool fills_now() {
    if (full_after < 0) return false;
    if (full_after > 0) return --full_after, false;
    disk_full = true;
    return true;
  }

 private:
  class Writable : public rocksdb::FSWritableFileOwnerWrapper {
   public:
    Writable(FaultyFileSystem* faults, std::unique_ptr<rocksdb::FSWritableFile> file)
        : FSWritableFileOwnerWrapper(std::move(file)), faults_(faults) {}
    using FSWritableFileOwnerWrapper::Append;
    rocksdb::IOStatus Append(const rocksdb::Slice& data,
                             const rocksdb::IOOptions& options,
                             rocksdb::IODebugContext* debug) override {
      faults_->blocked.wait(true);
      ++faults_->writes;
      if (faults_->read_only) return rocksdb::IOStatus::IOError("Read-only file system");
      faults_->fills_now();
      if (!faults_->disk_full) return target()->Append(data, options, debug);
      target()->Append({data.data(), data.size() / 2}, options, debug).PermitUncheckedError();
      return rocksdb::IOStatus::NoSpace("No space left on device");
    }
    rocksdb::IOStatus Append(const rocksdb::Slice& data,
                             const rocksdb::IOOptions& options,
                             const rocksdb::DataVerificationInfo&,
                             rocksdb::IODebugContext* debug) override {
      return Append(data, options, debug);
    }

   private:
    FaultyFileSystem* faults_;
  };
  class Readable : public rocksdb::FSRandomAccessFileOwnerWrapper {
   public:
    Readable(FaultyFileSystem* faults, std::unique_ptr<rocksdb::FSRandomAccessFile> file)
        : FSRandomAccessFileOwnerWrapper(std::move(file)), faults_(faults) {}
    rocksdb::IOStatus Read(uint64_t offset,
                           size_t size,
                           const rocksdb::IOOptions& options,
                           rocksdb::Slice* result,
                           char* scratch,
                           rocksdb::IODebugContext* debug) const override {
      rocksdb::IOStatus status = target()->Read(offset, size, options, result, scratch, debug);
      if (!status.ok() || result->size() < 100) return status;
      if (faults_->short_reads) *result = {result->data(), result->size() - 7};
      if (faults_->flipped_reads && result->data() == scratch) scratch[result->size() / 2] ^= 4;
      return status;
    }

   private:
    FaultyFileSystem* faults_;
  };
};

}  // namespace hadal::testing
