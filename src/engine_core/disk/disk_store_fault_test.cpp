// Faults of every kind under the disk store: what comes back is right or a miss.
#include <algorithm>
#include <functional>
#include <rocksdb/db.h>
#include <utility>

#include <gtest/gtest.h>

#include "testing/disk_store_fixture.h"

namespace hadal::engine_core {
namespace {

using hadal::testing::bytes_for;
using hadal::testing::disk_options;
using hadal::testing::FaultyFileSystem;
using hadal::testing::first_pages;
using hadal::testing::kPageTokens;
using hadal::testing::load_all;
using hadal::testing::prompt;
using hadal::testing::save_all;
using hadal::testing::TemporaryFolder;

/// The database without the store around it.
class RawDb {
 public:
  explicit RawDb(const std::string& folder) {
    rocksdb::ColumnFamilyOptions blobs;
    blobs.enable_blob_files = true;
    rocksdb::DB* opened = nullptr;
    const rocksdb::Status status =
        rocksdb::DB::Open(rocksdb::DBOptions(), folder + "/db",
                          {{"default", {}}, {"records", blobs}, {"index", {}}}, &handles_, &opened);
    EXPECT_TRUE(status.ok()) << status.ToString();
    db_.reset(opened);
  }
  ~RawDb() {
    for (rocksdb::ColumnFamilyHandle* handle : handles_) db_->DestroyColumnFamilyHandle(handle);
  }
  std::vector<std::pair<std::string, std::string>> all(size_t family) {
    std::vector<std::pair<std::string, std::string>> entries;
    const std::unique_ptr<rocksdb::Iterator> it(db_->NewIterator({}, handles_[family]));
    for (it->SeekToFirst(); it->Valid(); it->Next())
      entries.emplace_back(it->key().ToString(), it->value().ToString());
    return entries;
  }
  void put(size_t family, const std::string& key, const std::string& value) {
    EXPECT_TRUE(db_->Put({}, handles_[family], key, value).ok());
  }

 private:
  std::vector<rocksdb::ColumnFamilyHandle*> handles_;
  std::unique_ptr<rocksdb::DB> db_;
};

constexpr size_t kRecordsFamily = 1, kIndexFamily = 2;

WindowPolicy policy_with(RecordKind kind) {
  return kind == RecordKind::kWindow ? WindowPolicy::kFull : WindowPolicy::kPeriodic;
}

TEST(DiskStoreFaults, EveryDamagedRecordOfEveryKindIsAMissAndIsReplaced) {
  using Damage = std::function<std::string(const std::string&, std::mt19937_64&)>;
  const std::vector<std::pair<const char*, Damage>> damages = {
      {"bit flip",
       [](std::string record, std::mt19937_64& random) {
         record[random() % record.size()] ^= static_cast<char>(1 << (random() % 8));
         return record;
       }},
      {"truncated",
       [](const std::string& record, std::mt19937_64& random) {
         return record.substr(0, random() % record.size());
       }},
      {"empty", [](const std::string&, std::mt19937_64&) { return std::string(); }},
      {"newer version",
       [](std::string record, std::mt19937_64&) {
         record[4] = 2;
         const uint64_t checksum = record_checksum(
             std::as_bytes(std::span(record)).first(record.size() - sizeof(uint64_t)));
         record.replace(record.size() - sizeof checksum, sizeof checksum,
                        reinterpret_cast<const char*>(&checksum), sizeof checksum);
         return record;
       }},
      {"whole but of another prefix",
       [](const std::string& record, std::mt19937_64&) {
         const auto kind = static_cast<RecordKind>(record[6]);
         const std::vector<int64_t> other = prompt(77, 2);
         PrefixKeys keys("test model", kPageTokens);
         return encode_record(kind, 2 * kPageTokens, keys.last(other), first_pages(other, 1),
                              bytes_for(kind, other));
       }},
  };
  std::mt19937_64 random(11);
  const std::vector<int64_t> tokens = prompt(1, 6);
  for (const RecordKind kind : {RecordKind::kPage, RecordKind::kWindow, RecordKind::kSnapshot}) {
    TemporaryFolder folder;
    DiskStoreOptions options = disk_options(folder.path() + "/pristine", policy_with(kind));
    {
      DiskStore store(options);
      save_all(store, tokens);
    }
    for (const auto& [name, damage] : damages) {
      SCOPED_TRACE(name);
      options.folder = folder.path() + "/" + name;
      std::filesystem::copy(folder.path() + "/pristine", options.folder,
                            std::filesystem::copy_options::recursive);
      {
        RawDb raw(options.folder);
        for (const auto& [key, record] : raw.all(kRecordsFamily))
          if (key[0] == static_cast<char>(kind))
            raw.put(kRecordsFamily, key, damage(record, random));
      }
      DiskStore store(options);
      EXPECT_EQ(load_all(store, tokens), 0);
      EXPECT_GE(store.stats().damaged, 1);
      // Each load meets the next damaged one on its way.
      for (int again = 0; again < 20 && load_all(store, tokens) < 6 * kPageTokens; ++again) {
        store.flush();
        save_all(store, tokens);
        store.flush();
      }
      EXPECT_EQ(load_all(store, tokens), 6 * kPageTokens);
    }
  }
}

TEST(DiskStoreFaults, ADamagedPageInTheMiddleLeavesWhatComesBefore) {
  const std::vector<int64_t> tokens = prompt(1, 6);
  for (const WindowPolicy policy :
       {WindowPolicy::kFull, WindowPolicy::kPeriodic, WindowPolicy::kZero}) {
    TemporaryFolder folder;
    const DiskStoreOptions options = disk_options(folder.path(), policy);
    {
      DiskStore store(options);
      save_all(store, tokens);
    }
    {
      RawDb raw(folder.path());
      for (auto& [key, record] : raw.all(kRecordsFamily)) {
        const ParsedRecord parsed = parse_record(std::as_bytes(std::span(record)));
        ASSERT_TRUE(parsed.record);
        if (parsed.record->kind != RecordKind::kPage || parsed.record->pos != 4 * kPageTokens)
          continue;
        record[record.size() / 2] ^= 1;
        raw.put(kRecordsFamily, key, record);
      }
    }
    DiskStore store(options);
    EXPECT_EQ(load_all(store, tokens), (policy == WindowPolicy::kPeriodic ? 2 : 3) * kPageTokens);
    EXPECT_EQ(store.stats().damaged, 1);
  }
}

TEST(DiskStoreFaults, DamagedIndexEntriesAreForgotten) {
  TemporaryFolder folder;
  const DiskStoreOptions options = disk_options(folder.path(), WindowPolicy::kZero);
  const std::vector<int64_t> tokens = prompt(1, 6);
  {
    DiskStore store(options);
    save_all(store, tokens);
  }
  {
    RawDb raw(folder.path());
    for (auto& [key, entry] : raw.all(kIndexFamily)) {
      entry[entry.size() / 2] ^= 1;
      raw.put(kIndexFamily, key, entry);
    }
    raw.put(kIndexFamily, "a key of another length", "?");
  }
  {
    DiskStore store(options);
    EXPECT_EQ(load_all(store, tokens), 0);
    EXPECT_EQ(store.stats().entries, 0);
    EXPECT_EQ(store.stats().damaged, 7);
    save_all(store, tokens);
  }
  DiskStore store(options);
  EXPECT_EQ(store.stats().damaged, 0);
  EXPECT_EQ(load_all(store, tokens), 6 * kPageTokens);
}

std::vector<std::filesystem::path> files_below(const std::string& folder) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.is_regular_file() && entry.path().filename() != "LOCK") files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

/// Flips bits, cuts off, or empties a file; or takes it away.
void damage_file(const std::filesystem::path& path, std::mt19937_64& random) {
  const auto size = std::filesystem::file_size(path);
  const uint64_t how = random() % 8;
  if (how == 0) {
    std::filesystem::remove(path);
  } else if (how == 1) {
    std::filesystem::resize_file(path, size > 0 ? random() % size : 0);
  } else if (size > 0) {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    for (uint64_t flips = 1 + random() % 4; flips > 0; --flips) {
      const auto place = static_cast<std::streamoff>(random() % size);
      file.seekg(place);
      const auto byte = static_cast<char>(file.get() ^ (1 << (random() % 8)));
      file.seekp(place);
      file.put(byte);
    }
  }
}

TEST(DiskStoreFaults, DamagedFilesCostEntriesOrTheStoreButNeverAnAnswer) {
  std::mt19937_64 random(13);
  TemporaryFolder folder;
  const std::string pristine = folder.path() + "/pristine";
  const std::vector<std::vector<int64_t>> prompts = {prompt(1, 6), prompt(2, 6, 1, 20),
                                                     prompt(3, 6, 1, 20)};
  // Two openings: tables and blobs of the first, a log of the second.
  for (int opening = 0; opening < 2; ++opening) {
    DiskStore store(disk_options(pristine, WindowPolicy::kFull));
    for (int i = opening; i < 2 + opening; ++i) save_all(store, prompts[static_cast<size_t>(i)]);
  }
  const size_t files = files_below(pristine + "/db").size();
  int64_t whole = 0, partly = 0, lost = 0;
  for (size_t round = 0; round < 4 * files; ++round) {
    const std::string copy = folder.path() + "/copy";
    std::filesystem::remove_all(copy);
    std::filesystem::copy(pristine, copy, std::filesystem::copy_options::recursive);
    damage_file(files_below(copy + "/db")[round % files], random);
    int64_t found = 0;
    {
      DiskStore store(disk_options(copy, WindowPolicy::kFull));
      for (const auto& tokens : prompts) found += load_all(store, tokens);
      (found == 3 * 48 ? whole : found > 0 ? partly : lost) += 1;
      ASSERT_TRUE(store.stats().writing);
      for (int again = 0; again < 8; ++again) {
        for (const auto& tokens : prompts) save_all(store, tokens);
        store.flush();
        if (load_all(store, prompts[0]) == 48) break;
      }
      ASSERT_EQ(load_all(store, prompts[0]), 48);
    }
  }
  EXPECT_GT(whole, 0);
  EXPECT_GT(partly, 0);
  EXPECT_GT(lost, 0);
}

TEST(DiskStoreFaults, ADatabaseThatDoesNotOpenIsMovedAsideWhole) {
  TemporaryFolder folder;
  const DiskStoreOptions options = disk_options(folder.path(), WindowPolicy::kZero);
  const std::vector<int64_t> tokens = prompt(1, 3);
  for (const char* number : {"1", "2"}) {
    {
      DiskStore store(options);
      save_all(store, tokens);
    }
    { std::ofstream(folder.path() + "/db/CURRENT") << "nonsense"; }
    DiskStore store(options);
    EXPECT_EQ(store.stats().moved_aside, 1);
    EXPECT_EQ(load_all(store, tokens), 0);
    EXPECT_TRUE(std::filesystem::exists(folder.path() + "/damaged-" + number + "/CURRENT"));
  }
}

struct FaultyStore {
  TemporaryFolder folder;
  std::shared_ptr<FaultyFileSystem> faults = std::make_shared<FaultyFileSystem>();
  std::unique_ptr<rocksdb::Env> env = rocksdb::NewCompositeEnv(faults);
  DiskStoreOptions options = disk_options(folder.path(), WindowPolicy::kPeriodic);
  FaultyStore() { options.env = env.get(); }
};

bool comes_true(const std::function<bool()>& condition) {
  for (int wait = 0; wait < 400; ++wait) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return false;
}

TEST(DiskStoreFaults, AFullDiskStopsWritingNotReadingAndIsTriedAgain) {
  FaultyStore with;
  DiskStore store(with.options);
  const std::vector<int64_t> before = prompt(1, 6), during = prompt(2, 6), after = prompt(3, 6);
  save_all(store, before);
  store.flush();
  with.faults->disk_full = true;
  for (int times = 0; times < 20; ++times) {
    save_all(store, during);
    store.flush();
    EXPECT_EQ(load_all(store, during), 0);
    // Reopening for another try takes a moment, in which everything misses.
    EXPECT_TRUE(comes_true([&] { return load_all(store, before) == 48; }));
  }
  EXPECT_GE(store.stats().write_errors, 1);
  EXPECT_GT(store.stats().dropped_off, 0);
  with.faults->disk_full = false;
  EXPECT_TRUE(comes_true([&] { return store.stats().writing; }));
  save_all(store, after);
  store.flush();
  EXPECT_EQ(load_all(store, after), 48);
  EXPECT_EQ(load_all(store, before), 48);
  EXPECT_EQ(store.stats().damaged, 0);
  EXPECT_EQ(store.stats().moved_aside, 0);
}

TEST(DiskStoreFaults, AReadOnlyFolderIsReadUntilItCanBeWritten) {
  FaultyStore with;
  const std::vector<int64_t> before = prompt(1, 6), after = prompt(3, 6);
  {
    DiskStore store(with.options);
    save_all(store, before);
  }
  with.faults->read_only = true;
  DiskStore store(with.options);
  EXPECT_EQ(store.stats().state, DiskDb::State::kReadOnly);
  EXPECT_EQ(load_all(store, before), 48);
  save_all(store, after);
  EXPECT_GT(store.stats().dropped_off, 0);
  with.faults->read_only = false;
  EXPECT_TRUE(comes_true([&] { return store.stats().writing; }));
  save_all(store, after);
  store.flush();
  EXPECT_EQ(load_all(store, after), 48);
  EXPECT_EQ(load_all(store, before), 48);
}

TEST(DiskStoreFaults, ShortAndWrongReadsAreMisses) {
  for (const bool short_reads : {true, false}) {
    FaultyStore with;
    const std::vector<int64_t> tokens = prompt(1, 6);
    {
      DiskStore store(with.options);
      save_all(store, tokens);
    }
    DiskStore store(with.options);
    ASSERT_EQ(load_all(store, tokens), 48);
    (short_reads ? with.faults->short_reads : with.faults->flipped_reads) = true;
    EXPECT_EQ(load_all(store, tokens), 0);
    EXPECT_GE(store.stats().damaged, 1);
    with.faults->short_reads = with.faults->flipped_reads = false;
    for (int again = 0; again < 4; ++again) {
      save_all(store, tokens);
      store.flush();
    }
    EXPECT_EQ(load_all(store, tokens), 48);
  }
}

TEST(DiskStoreFaults, AFolderThatCannotBeMadeTurnsTheStoreOff) {
  TemporaryFolder folder;
  { std::ofstream(folder.path() + "/file") << "in the way"; }
  DiskStore store(disk_options(folder.path() + "/file/store", WindowPolicy::kZero));
  EXPECT_EQ(store.stats().state, DiskDb::State::kOff);
  const std::vector<int64_t> tokens = prompt(1, 3);
  save_all(store, tokens);
  store.flush();
  EXPECT_EQ(load_all(store, tokens), 0);
}

}  // namespace
}  // namespace hadal::engine_core
