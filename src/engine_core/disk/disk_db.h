// RocksDB as the disk store uses it: a folder with a lock and a database, opened, moved aside when
// it is damaged, and closed; records by key, with a small index of them beside.
//
//   FOLDER/lock          held by the one process that uses the folder
//   FOLDER/db/           the database: "index" in the tree, records in blob files
//   FOLDER/damaged-N/    a database that did not open, untouched, for people to look at or delete
//
// Writes are atomic batches behind a write-ahead log that is not synced: SIGKILL loses nothing that
// was written, a power cut at most the last seconds. A refused write is to the files a SIGKILL at
// that moment (freezing_file_system.h): open() again for what can be read. No failure throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace rocksdb {
class Env;
}

namespace hadal::engine_core {

/// What happens to a database in the folder that is no disk store, or one of another version.
enum class ForeignStore : uint8_t {
  kMoveAside,  ///< renamed to FOLDER/foreign-N; a new store is begun
  kLeave,      ///< it stays as it is; this process runs without a store
};

class DiskDb {
 public:
  struct Options {
    std::string folder;
    int64_t max_bytes = 0;  ///< sizes of memory tables and blob files follow from it
    ForeignStore foreign = ForeignStore::kMoveAside;
    rocksdb::Env* env = nullptr;  ///< nullptr: the system; tests inject faults; outlives the object
  };
  enum class State : uint8_t {
    kOff,       ///< neither reads nor writes
    kReadOnly,  ///< the folder cannot be written to
    kOn,
  };
  struct Opened {
    State state = State::kOff;
    std::string reason;  ///< of anything but kOn
    bool moved_aside = false;
  };
  struct Put {
    std::string key, record, index;
  };
  struct Batch {
    std::vector<Put> puts;
    std::vector<std::string> removals;
    std::vector<std::pair<std::string, std::string>> index_only;  ///< key, index entry
  };
  enum class Found : uint8_t { kYes, kNo, kDamaged };

  explicit DiskDb(Options options);
  ~DiskDb();

  /// Opens, or closes and opens again; where there is no room to write, or unless `may_write`, for
  /// reading alone. `each` gets all index entries; forget them when the result says moved_aside:
  /// then the store is a new one.
  Opened open(const std::function<void(std::string key, std::span<const std::byte> entry)>& each,
              bool may_write = true);
  /// Whether the file system has room enough to begin writing.
  bool has_room() const;
  /// Why nothing is written any more since open(), found by any thread; empty while all is well.
  std::string failure() const;
  /// `use` gets the record's bytes; `*fault` the reason of kDamaged. kNo while another thread is in
  /// open().
  Found get(const std::string& key,
            const std::function<void(std::span<const std::byte>)>& use,
            std::string* fault);
  /// Empty when written, else the reason. After a failure nothing more is written until open().
  /// Errors of reads are misses then.
  std::string write(const Batch& batch);
  /// Gives the space of removed records back to the file system. Slow.
  void compact();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace hadal::engine_core
