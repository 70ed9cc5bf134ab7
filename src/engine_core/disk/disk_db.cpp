#include "engine_core/disk/disk_db.h"

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <filesystem>
#include <mutex>
#include <optional>
#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/options.h>
#include <rocksdb/table.h>
#include <rocksdb/write_batch.h>
#include <shared_mutex>
#include <string_view>
#include <system_error>

#include "base/check.h"
#include "base/file.h"
#include "base/log.h"
#include "engine_core/disk/freezing_file_system.h"

namespace hadal::engine_core {
namespace {

constexpr const char* kRecords = "records";
constexpr const char* kIndex = "index";
constexpr const char* kMarkerKey = "format";
constexpr const char* kMarker = "hadal prefix store 1";

/// Bytes of the file system that are left to others. To begin with there must be more, or closing
/// and opening would make room for the next write and nothing else, again and again.
constexpr uint64_t kLeftFree = uint64_t{4} << 20;
constexpr uint64_t kFreeToBegin = 3 * kLeftFree;

std::string no_room(uint64_t bytes) {
  return concat("less than ", bytes >> 20, " MiB of the file system are free");
}

/// RocksDB's own log is a file that is renamed and made anew at every start.
class NoLog final : public rocksdb::Logger {
 public:
  using Logger::Logv;
  void Logv(const char* /*format*/, va_list /*arguments*/) override {}
};

std::span<const std::byte> bytes_of(const rocksdb::Slice& slice) {
  return std::as_bytes(std::span(slice.data(), slice.size()));
}

/// What failed says that the files themselves are bad, not that the system would not let us.
bool means_damage(const rocksdb::Status& status) {
  return status.IsCorruption() || status.IsPathNotFound() || status.IsNotFound();
}

}  // namespace

struct DiskDb::Impl {
  Options options;
  std::string path;
  std::shared_ptr<FreezingFileSystem> files;
  std::unique_ptr<rocksdb::Env> env;
  std::optional<FileLock> lock;
  std::shared_mutex mutex;  // exclusive: open and close
  std::unique_ptr<rocksdb::DB> db;
  std::vector<rocksdb::ColumnFamilyHandle*> handles;  // default, records, index
  std::atomic<bool> damaged = false;  // found while writing: the next open() moves it aside

  rocksdb::ColumnFamilyHandle* records() const { return handles[1]; }
  rocksdb::ColumnFamilyHandle* index() const { return handles[2]; }

  explicit Impl(Options given)
      : options(std::move(given)),
        path(options.folder + "/db"),
        files(std::make_shared<FreezingFileSystem>(
            (options.env ? options.env : rocksdb::Env::Default())->GetFileSystem())),
        env(rocksdb::NewCompositeEnv(files)) {}

  rocksdb::DBOptions db_options() const;
  std::vector<rocksdb::ColumnFamilyDescriptor> families() const;
  void close();
  bool take_lock(std::string* reason);
  bool is_foreign();
  bool lost_its_head() const;
  bool has_room(uint64_t bytes) const { return files->free_bytes(options.folder) >= bytes; }
  rocksdb::Status try_open(bool read_only);
  rocksdb::Status try_open_some_way(bool may_write,
                                    bool* read_only,
                                    bool* foreign,
                                    std::string* reason);
  rocksdb::Status check_marker(bool read_only, bool* foreign);
  bool move_aside(const char* why, const std::string& reason);
};

rocksdb::DBOptions DiskDb::Impl::db_options() const {
  rocksdb::DBOptions db_options;
  db_options.env = env.get();
  db_options.create_if_missing = true;
  db_options.create_missing_column_families = true;
  // A record and its index entry reach the tables together.
  db_options.atomic_flush = true;
  // Batches behind a damaged one in the log are as good as others: a key's content never changes.
  db_options.wal_recovery_mode = rocksdb::WALRecoveryMode::kSkipAnyCorruptedRecords;
  db_options.max_open_files = 256;
  db_options.max_background_jobs = 2;
  db_options.info_log_level = rocksdb::InfoLogLevel::WARN_LEVEL;
  db_options.info_log = std::make_shared<NoLog>();
  db_options.stats_dump_period_sec = 0;
  db_options.stats_persist_period_sec = 0;
  return db_options;
}

std::vector<rocksdb::ColumnFamilyDescriptor> DiskDb::Impl::families() const {
  rocksdb::BlockBasedTableOptions table;
  table.cache_index_and_filter_blocks = false;
  rocksdb::ColumnFamilyOptions small;
  small.compression = rocksdb::kNoCompression;
  small.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  small.write_buffer_size = size_t{4} << 20;
  rocksdb::ColumnFamilyOptions large = small;
  // Records lie in blob files: the tree holds only keys, so that compaction moves next to nothing,
  // and damage to a blob file costs the records it hits. The bytes do not compress.
  large.enable_blob_files = true;
  large.min_blob_size = 0;
  large.write_buffer_size = static_cast<size_t>(
      std::clamp<int64_t>(options.max_bytes / 64, int64_t{1} << 20, int64_t{128} << 20));
  large.blob_file_size = large.write_buffer_size;
  large.enable_blob_garbage_collection = true;
  return {{rocksdb::kDefaultColumnFamilyName, small}, {kRecords, large}, {kIndex, small}};
}

void DiskDb::Impl::close() {
  for (rocksdb::ColumnFamilyHandle* handle : handles) db->DestroyColumnFamilyHandle(handle);
  handles.clear();
  db.reset();
}

bool DiskDb::Impl::take_lock(std::string* reason) {
  if (lock) return true;
  try {
    std::error_code error;
    std::filesystem::create_directories(options.folder, error);
    HADAL_INPUT_CHECK(!error, options.folder, ": ", error.message());
    lock.emplace(options.folder + "/lock");
    return true;
  } catch (const InputError& error) {
    *reason = error.what();
    return false;
  }
}

/// A database with other column families than ours; where it is to be left alone, also one with
/// content but not our marker. Reads only.
bool DiskDb::Impl::is_foreign() {
  std::vector<std::string> names;
  const rocksdb::DBOptions existing = db_options();
  if (!rocksdb::DB::ListColumnFamilies(existing, path, &names).ok()) return false;
  std::erase(names, rocksdb::kDefaultColumnFamilyName);
  std::erase(names, kRecords);
  std::erase(names, kIndex);
  if (!names.empty()) return true;
  if (options.foreign == ForeignStore::kMoveAside) return false;  // check_marker() will tell
  rocksdb::DB* opened = nullptr;
  if (!rocksdb::DB::OpenForReadOnly(rocksdb::Options(existing, {}), path, &opened).ok())
    return false;
  const std::unique_ptr<rocksdb::DB> peeked(opened);
  std::string marker;
  if (peeked->Get({}, kMarkerKey, &marker).ok()) return marker != kMarker;
  const std::unique_ptr<rocksdb::Iterator> it(peeked->NewIterator({}));
  it->SeekToFirst();
  return it->Valid();
}

/// RocksDB would begin anew over files whose CURRENT is gone, and delete them.
bool DiskDb::Impl::lost_its_head() const {
  std::error_code error;
  if (std::filesystem::exists(path + "/CURRENT", error)) return false;
  for (auto it = std::filesystem::directory_iterator(path, error);
       !error && it != std::filesystem::directory_iterator(); it.increment(error)) {
    const std::string extension = it->path().extension().string();
    if (extension == ".sst" || extension == ".blob" || extension == ".log") return true;
  }
  return false;
}

rocksdb::Status DiskDb::Impl::try_open(bool read_only) {
  if (lost_its_head()) return rocksdb::Status::Corruption("CURRENT is missing");
  rocksdb::DB* opened = nullptr;
  const rocksdb::Status status =
      read_only ? rocksdb::DB::OpenForReadOnly(db_options(), path, families(), &handles, &opened)
                : rocksdb::DB::Open(db_options(), path, families(), &handles, &opened);
  db.reset(opened);
  return status;
}

rocksdb::Status DiskDb::Impl::check_marker(bool read_only, bool* foreign) {
  std::string marker;
  rocksdb::Status status = db->Get({}, handles[0], kMarkerKey, &marker);
  if (!status.IsNotFound()) {
    *foreign = status.ok() && marker != kMarker;
    return status;
  }
  for (rocksdb::ColumnFamilyHandle* handle : {handles[0], index()}) {
    const std::unique_ptr<rocksdb::Iterator> it(db->NewIterator({}, handle));
    it->SeekToFirst();
    if (!it->status().ok()) return it->status();
    *foreign = *foreign || it->Valid();
  }
  if (*foreign || read_only) return rocksdb::Status::OK();
  return db->Put({}, handles[0], kMarkerKey, kMarker);
}

bool DiskDb::Impl::move_aside(const char* why, const std::string& reason) {
  close();
  std::error_code error;
  std::string target;
  for (int number = 1; target.empty() || std::filesystem::exists(target, error); ++number)
    target = concat(options.folder, '/', why, '-', number);
  std::filesystem::rename(path, target, error);
  if (error) {
    log::warn("disk", path, " is ", why, " (", reason, ") and cannot be moved: ", error.message());
    return false;
  }
  log::warn("disk", path, " is ", why, " (", reason, "): moved to ", target,
            ", a new store is begun; delete it when it is of no use");
  return true;
}

/// For writing if the system lets us, else for reading.
rocksdb::Status DiskDb::Impl::try_open_some_way(bool may_write,
                                                bool* read_only,
                                                bool* foreign,
                                                std::string* reason) {
  *read_only = false;
  if (!may_write || !has_room(kFreeToBegin)) {
    *reason = no_room(kFreeToBegin);
  } else {
    rocksdb::Status status = try_open(false);
    if (status.ok()) status = check_marker(false, foreign);
    // What RocksDB says of files that it could not write is not to be believed.
    if (!files->failed() && (status.ok() || means_damage(status) || !status.IsIOError())) {
      *reason = status.ToString();
      return status;
    }
    *reason = files->failed() ? files->reason() : status.ToString();
    *foreign = false;
  }
  close();
  files->thaw();
  *read_only = true;
  rocksdb::Status status = try_open(true);
  if (status.ok()) return check_marker(true, foreign);
  close();
  return rocksdb::Status::IOError(status.ToString());
}

DiskDb::DiskDb(Options options) : impl_(std::make_unique<Impl>(std::move(options))) {}

DiskDb::~DiskDb() {
  const std::unique_lock lock(impl_->mutex);
  impl_->close();
}

DiskDb::Opened DiskDb::open(
    const std::function<void(std::string, std::span<const std::byte>)>& each, bool may_write) {
  Impl& impl = *impl_;
  const std::unique_lock lock(impl.mutex);
  Opened result;
  impl.close();
  impl.files->thaw();
  if (!impl.take_lock(&result.reason)) return result;
  if (impl.damaged.exchange(false))
    result.moved_aside = impl.move_aside("damaged", "found while writing");
  for (int attempt = 0; attempt < 3; ++attempt) {
    bool foreign = impl.is_foreign(), read_only = false;
    rocksdb::Status status;
    if (!foreign) status = impl.try_open_some_way(may_write, &read_only, &foreign, &result.reason);
    if (foreign && impl.options.foreign == ForeignStore::kLeave) {
      impl.close();
      result.reason = impl.path + ": is a store of another version or something else";
      return result;
    }
    if (!foreign && status.ok()) {
      const std::unique_ptr<rocksdb::Iterator> it(impl.db->NewIterator({}, impl.index()));
      for (it->SeekToFirst(); it->Valid(); it->Next())
        each(it->key().ToString(), bytes_of(it->value()));
      status = it->status();
      if (status.ok()) {
        result.state = read_only ? State::kReadOnly : State::kOn;
        return result;
      }
    }
    // What is only read may look damaged because its last writes were refused.
    if (!foreign && (read_only || (status.IsIOError() && !means_damage(status)))) {
      impl.close();
      return result;
    }
    result.reason = foreign ? "not a store of this version" : status.ToString();
    if (!impl.move_aside(foreign ? "foreign" : "damaged", result.reason)) return result;
    result.moved_aside = true;
  }
  impl.close();
  return result;
}

bool DiskDb::has_room() const { return impl_->has_room(kFreeToBegin); }

std::string DiskDb::failure() const { return impl_->files->reason(); }

DiskDb::Found DiskDb::get(const std::string& key,
                          const std::function<void(std::span<const std::byte>)>& use,
                          std::string* fault) {
  const std::shared_lock lock(impl_->mutex, std::try_to_lock);
  if (!lock || !impl_->db) return Found::kNo;
  rocksdb::PinnableSlice value;
  const rocksdb::Status status = impl_->db->Get({}, impl_->records(), key, &value);
  if (status.IsNotFound()) return Found::kNo;
  if (!status.ok()) {
    if (impl_->files->failed()) return Found::kNo;  // written by a write that was refused
    *fault = status.ToString();
    return Found::kDamaged;
  }
  use(bytes_of(value));
  return Found::kYes;
}

std::string DiskDb::write(const Batch& batch) {
  const std::shared_lock lock(impl_->mutex);
  if (!impl_->db) return "the store is off";
  if (!impl_->has_room(kLeftFree)) return no_room(kLeftFree);
  rocksdb::WriteBatch writes;
  for (const std::string& key : batch.removals) {
    writes.Delete(impl_->records(), key);
    writes.Delete(impl_->index(), key);
  }
  for (const Put& put : batch.puts) {
    writes.Put(impl_->records(), put.key, put.record);
    writes.Put(impl_->index(), put.key, put.index);
  }
  for (const auto& [key, entry] : batch.index_only) writes.Put(impl_->index(), key, entry);
  const rocksdb::Status status = impl_->db->Write({}, &writes);
  if (impl_->files->failed()) return impl_->files->reason();
  if (status.ok()) return "";
  if (status.IsCorruption()) impl_->damaged = true;
  return status.ToString();
}

void DiskDb::compact() {
  const std::shared_lock lock(impl_->mutex);
  if (!impl_->db) return;
  for (rocksdb::ColumnFamilyHandle* family : {impl_->records(), impl_->index()}) {
    const rocksdb::Status status = impl_->db->CompactRange({}, family, nullptr, nullptr);
    if (impl_->files->failed()) return;  // told by the next write
    if (!status.ok()) log::warn("disk", "space is not given back: ", status.ToString());
  }
}

}  // namespace hadal::engine_core
