// The prefix store on disk: pages, window rows and snapshots of prefixes under names that chain
// the model's identity and the token ids (docs/kv_cache_disk.md).
//
// It serves or it does not, but it never stands in the way: writes go through a bounded queue to a
// thread of their own and are dropped when it is full; whatever is wrong with an entry, the
// database, the folder or the disk is a logged miss. What load() returns is what was saved for
// exactly these tokens.
//
// Thread-safe. A load reads the disk in the caller's thread, a bounded piece at a time; the others
// do not touch it.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "engine_core/disk/disk_db.h"
#include "engine_core/disk/disk_record.h"
#include "engine_core/prefix_store.h"
#include "engine_core/text_store.h"

namespace hadal::engine_core {

struct DiskStoreOptions {
  std::string folder;  ///< made when absent
  /// Weights digest, versions of numerics and of the layout of pages and snapshots: all that must
  /// be equal for stored bytes to mean the same. Models may share a folder and its budget.
  std::string identity;
  int64_t page_tokens = 256;
  WindowPolicy policy = WindowPolicy::kPeriodic;
  int64_t period = 256;      ///< kPeriodic: tokens between snapshots, a multiple of the page
  int64_t window_pages = 1;  ///< kFull: pages that the window reaches back, ceil(n_win / page)
  int64_t max_bytes = int64_t{16} << 30;     ///< of records; files take up to about twice as much
  int64_t queue_bytes = int64_t{256} << 20;  ///< of writes that wait
  ForeignStore foreign = ForeignStore::kMoveAside;
  std::chrono::milliseconds retry{30'000};  ///< until writing is tried again after it failed
  rocksdb::Env* env = nullptr;              ///< for tests that inject faults
};

/// Counts since the start.
struct DiskStoreStats {
  struct Traffic {
    int64_t written = 0, written_bytes = 0;  ///< payloads, as the caller gave them
    int64_t read = 0, read_bytes = 0;
  };
  DiskDb::State state = DiskDb::State::kOff;
  bool writing = false;
  std::array<Traffic, kRecordKinds> traffic{};  ///< by RecordKind
  int64_t record_bytes_written = 0;             ///< payloads, headers and token ids
  int64_t entries = 0, bytes = 0;               ///< stored or queued now
  int64_t hits = 0, misses = 0, loaded_tokens = 0;
  int64_t damaged = 0;                        ///< entries that turned out to be no good
  int64_t dropped_full = 0, dropped_off = 0;  ///< saves: the queue was full; writing was off
  int64_t write_errors = 0;
  int64_t evicted = 0, evicted_bytes = 0;
  int64_t moved_aside = 0;  ///< databases

  const Traffic& of(RecordKind kind) const { return traffic[static_cast<size_t>(kind)]; }
};

class DiskStore : public PrefixStore, public TextStore {
 public:
  /// Always a store, if need be one that is off; InputError only for impossible options.
  explicit DiskStore(DiskStoreOptions options);
  /// Writes what is queued.
  ~DiskStore() override;

  int64_t page_tokens() const override;
  void set_identity(const std::string& identity) override;
  /// Copies the tokens.
  std::unique_ptr<PrefixLoad> begin_load(std::span<const int64_t> tokens,
                                         int64_t from_page,
                                         int64_t max_pos) override;
  bool save_page(std::span<const int64_t> prefix_tokens, std::span<const std::byte> page) override;
  void save_snapshot(std::span<const int64_t> prefix_tokens,
                     std::span<const std::byte> snapshot) override;
  void save_window(std::span<const int64_t> prefix_tokens,
                   std::span<const std::byte> window) override;
  /// Queued like a write.
  void touch(std::span<const int64_t> tokens) override;
  /// Of records.
  int64_t stored_bytes() const override;
  WindowPolicy policy() const override;
  bool wants_snapshot(int64_t pos) const override;

  /// Texts do not depend on the identity.
  bool put_text(const std::string& name, const std::string& text) override;
  std::optional<std::string> get_text(const std::string& name) override;
  bool erase_text(const std::string& name) override;

  /// Waits until everything saved so far is written (or given up).
  void flush();
  DiskStoreStats stats() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace hadal::engine_core
