#include "engine_core/disk/disk_store.h"

#include <random>
#include <rocksdb/db.h>
#include <set>

#include <gtest/gtest.h>

#include "base/check.h"
#include "testing/disk_store_fixture.h"

namespace hadal::engine_core {
namespace {

using hadal::testing::bytes_for;
using hadal::testing::disk_options;
using hadal::testing::FaultyFileSystem;
using hadal::testing::first_pages;
using hadal::testing::kPageBytes;
using hadal::testing::kPageTokens;
using hadal::testing::kSnapshotBytes;
using hadal::testing::kWindowBytes;
using hadal::testing::load_all;
using hadal::testing::load_checked;
using hadal::testing::prompt;
using hadal::testing::save_all;
using hadal::testing::TemporaryFolder;

constexpr std::array kPolicies = {WindowPolicy::kFull, WindowPolicy::kPeriodic,
                                  WindowPolicy::kZero};

/// What a store that loses nothing returns.
int64_t expected_pos(WindowPolicy policy, int64_t stored, int64_t from_page, int64_t max_pos) {
  int64_t pages = std::min(stored, max_pos / kPageTokens);
  if (policy == WindowPolicy::kPeriodic) pages -= pages % 2;
  if (policy == WindowPolicy::kZero && pages <= from_page) return 0;
  return pages * kPageTokens;
}

TEST(DiskStore, ReturnsTheLongestPrefixUnderEveryPolicyAlsoAfterARestart) {
  for (const WindowPolicy policy : kPolicies) {
    TemporaryFolder folder;
    std::mt19937_64 random(7);
    std::vector<std::vector<int64_t>> prompts;
    std::set<std::vector<int64_t>> prefixes;
    for (int round = 0; round < 2; ++round) {
      DiskStore store(disk_options(folder.path(), policy));
      for (uint64_t i = 0; i < 10; ++i) {
        const auto pages = static_cast<int64_t>(random() % 9);
        prompts.push_back(prompt(random(), pages, i % 3, static_cast<int64_t>(random() % 50)));
        save_all(store, prompts.back());
        for (int64_t page = 1; page <= pages; ++page) {
          const auto prefix = first_pages(prompts.back(), page);
          prefixes.emplace(prefix.begin(), prefix.end());
        }
      }
      store.flush();
      for (int i = 0; i < 200; ++i) {
        const std::vector<int64_t>& saved = prompts[random() % prompts.size()];
        std::vector<int64_t> tokens = saved;
        const size_t differs = random() % (saved.size() + 30);
        if (differs < tokens.size()) tokens[differs] = 1000;
        tokens.resize(tokens.size() + random() % 20, 1001);
        int64_t stored = 0;
        while ((stored + 1) * kPageTokens <= std::ssize(tokens)) {
          const auto next = first_pages(tokens, stored + 1);
          if (!prefixes.contains({next.begin(), next.end()})) break;
          ++stored;
        }
        const auto max_pos = static_cast<int64_t>(random() % (tokens.size() + 2));
        const auto from_page = static_cast<int64_t>(random() % static_cast<size_t>(stored + 1));
        ASSERT_EQ(load_checked(store, tokens, from_page, max_pos),
                  expected_pos(policy, stored, from_page, max_pos));
      }
      EXPECT_EQ(store.stats().damaged, 0);
    }
  }
}

TEST(DiskStore, BytesWrittenAreTheFormulasOfThePolicies) {
  constexpr int64_t kPages = 21;
  for (const WindowPolicy policy : kPolicies) {
    TemporaryFolder folder;
    DiskStore store(disk_options(folder.path(), policy));
    const std::vector<int64_t> tokens = prompt(1, kPages);
    for (int again = 0; again < 2; ++again) {  // what is stored is not written twice
      save_all(store, tokens);
      store.flush();
    }
    const DiskStoreStats stats = store.stats();
    const int64_t windows = policy == WindowPolicy::kFull ? kPages : 0;
    const int64_t snapshots = policy == WindowPolicy::kPeriodic ? kPages / 2 : 0;
    EXPECT_EQ(store.stored_bytes(), stats.bytes);
    EXPECT_EQ(stats.of(RecordKind::kPage).written_bytes, kPages * kPageBytes);
    EXPECT_EQ(stats.of(RecordKind::kWindow).written_bytes, windows * kWindowBytes);
    EXPECT_EQ(stats.of(RecordKind::kSnapshot).written_bytes, snapshots * kSnapshotBytes);
    const int64_t records = kPages + windows + snapshots;
    EXPECT_EQ(stats.record_bytes_written, stats.bytes);
    EXPECT_EQ(stats.bytes, kPages * kPageBytes + windows * kWindowBytes +
                               snapshots * kSnapshotBytes + records * (72 + 4 * kPageTokens));
    // A hit reads the pages asked for and what resumes, no more.
    const int64_t pos = load_checked(store, tokens, 3, std::ssize(tokens));
    const DiskStoreStats after = store.stats();
    EXPECT_EQ(after.of(RecordKind::kPage).read_bytes, (pos / kPageTokens - 3) * kPageBytes);
    EXPECT_EQ(after.of(RecordKind::kWindow).read_bytes, windows > 0 ? 2 * kWindowBytes : 0);
    EXPECT_EQ(after.of(RecordKind::kSnapshot).read_bytes, snapshots > 0 ? kSnapshotBytes : 0);
  }
}

TEST(DiskStore, ALoadGoesOnInBoundedPiecesAndFindsTheSame) {
  constexpr int64_t kPages = 200, kFrom = 3;
  const std::vector<int64_t> tokens = prompt(1, kPages), other = prompt(2, 5);
  for (const WindowPolicy policy : kPolicies) {
    TemporaryFolder folder;
    DiskStore store(disk_options(folder.path(), policy));
    save_all(store, tokens);
    save_all(store, other);
    store.flush();
    const int64_t expected = load_checked(store, tokens, kFrom, std::ssize(tokens));
    const auto load = store.begin_load(tokens, kFrom, std::ssize(tokens));
    std::vector<std::vector<std::byte>> pages;
    int64_t pieces = 0;
    for (size_t before = 0; load->advance(2, pages); before = pages.size(), ++pieces) {
      EXPECT_LE(pages.size(), before + 2);
      EXPECT_GT(load_all(store, other), 0);  // others come between
    }
    EXPECT_GE(pieces, (kPages - kFrom) / 2);
    const auto found = load->take_result();
    ASSERT_TRUE(found);
    EXPECT_EQ(found->pos, expected);
    EXPECT_EQ(std::ssize(pages), expected / kPageTokens - kFrom);
    for (int64_t i = 0; i < std::ssize(pages); ++i)
      EXPECT_EQ(pages[static_cast<size_t>(i)],
                bytes_for(RecordKind::kPage, first_pages(tokens, kFrom + i + 1)));
  }
}

TEST(DiskStore, ModelsShareAFolderButNoEntries) {
  TemporaryFolder folder;
  DiskStoreOptions options = disk_options(folder.path(), WindowPolicy::kZero);
  const std::vector<int64_t> tokens = prompt(1, 3);
  {
    DiskStore store(options);
    save_all(store, tokens);
  }
  options.identity = "other weights";
  {
    DiskStore store(options);
    EXPECT_EQ(store.stats().entries, 3);
    EXPECT_EQ(load_all(store, tokens), 0);
    EXPECT_EQ(store.stats().misses, 1);
  }
  options.identity = "test model";
  DiskStore store(options);
  EXPECT_EQ(load_all(store, tokens), 3 * kPageTokens);
}

int64_t folder_bytes(const std::string& path) {
  int64_t bytes = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(path))
    if (entry.is_regular_file()) bytes += static_cast<int64_t>(entry.file_size());
  return bytes;
}

TEST(DiskStore, StaysInItsBudgetAndKeepsWhatIsUsed) {
  TemporaryFolder folder;
  DiskStoreOptions options = disk_options(folder.path(), WindowPolicy::kPeriodic);
  options.max_bytes = int64_t{2} << 20;
  const std::vector<int64_t> favourite = prompt(999, 20);
  int64_t saved = 0;
  for (int start = 0; start < 3; ++start) {
    DiskStore store(options);
    if (start == 0) save_all(store, favourite);
    for (uint64_t i = 0; i < 40; ++i) {
      save_all(store, prompt(1000 * static_cast<uint64_t>(start) + i, 20));
      store.flush();
      ASSERT_LE(store.stats().bytes, options.max_bytes);
      ASSERT_EQ(load_all(store, favourite), 20 * kPageTokens) << start << ' ' << i;
    }
    saved += store.stats().record_bytes_written;
    EXPECT_GT(store.stats().evicted, 0);
    // An old one is gone from its end, never from its middle.
    EXPECT_LT(load_all(store, prompt(1000 * static_cast<uint64_t>(start) + 1, 20)),
              20 * kPageTokens);
  }
  EXPECT_GT(saved, 4 * options.max_bytes);
  // Blob files, the log of two memory tables, RocksDB's own.
  EXPECT_LT(folder_bytes(folder.path()), 2 * options.max_bytes + (int64_t{4} << 20));
}

TEST(DiskStore, TimesOfUseSurviveARestart) {
  TemporaryFolder folder;
  DiskStoreOptions options = disk_options(folder.path(), WindowPolicy::kZero);
  const std::vector<int64_t> first = prompt(1, 10), second = prompt(2, 10), third = prompt(3, 10);
  {
    DiskStore store(options);
    for (const auto& tokens : {first, second, third}) {
      EXPECT_EQ(load_all(store, tokens), 0);
      save_all(store, tokens);
    }
    store.flush();
    store.touch(first);
    store.flush();
  }
  options.max_bytes = 20 * record_bytes(kPageTokens, kPageBytes);
  DiskStore store(options);
  save_all(store, prompt(4, 1));  // the first write evicts what is over the budget
  store.flush();
  EXPECT_LT(load_all(store, second), 10);
  EXPECT_EQ(load_all(store, first), 80);
  EXPECT_GE(load_all(store, third), 64);
}

TEST(DiskStore, ASlowDiskDropsWritesAndNeverBlocksTheCaller) {
  TemporaryFolder folder;
  const auto faults = std::make_shared<FaultyFileSystem>();
  const std::unique_ptr<rocksdb::Env> env = rocksdb::NewCompositeEnv(faults);
  DiskStoreOptions options = disk_options(folder.path(), WindowPolicy::kZero);
  options.env = env.get();
  options.queue_bytes = 50'000;
  DiskStore store(options);
  faults->blocked = true;
  const std::vector<int64_t> tokens = prompt(1, 100);
  save_all(store, tokens);  // would never return if it waited
  EXPECT_GE(store.stats().dropped_full, 80);
  faults->blocked = false;
  faults->blocked.notify_all();
  store.flush();
  const int64_t stored = load_all(store, tokens) / kPageTokens;
  EXPECT_EQ(stored, 100 - store.stats().dropped_full);
  save_all(store, first_pages(tokens, stored + 5));
  store.flush();
  EXPECT_EQ(load_all(store, tokens), (stored + 5) * kPageTokens);
}

TEST(DiskStore, ASecondProcessRunsWithoutIt) {
  TemporaryFolder folder;
  const DiskStoreOptions options = disk_options(folder.path(), WindowPolicy::kZero);
  const std::vector<int64_t> tokens = prompt(1, 3);
  auto store = std::make_unique<DiskStore>(options);
  save_all(*store, tokens);
  store->flush();
  DiskStore second(options);
  EXPECT_EQ(second.stats().state, DiskDb::State::kOff);
  EXPECT_EQ(load_all(second, tokens), 0);
  save_all(second, tokens);
  EXPECT_EQ(second.stats().dropped_off, 3);
  EXPECT_EQ(load_all(*store, tokens), 24);
  // When the first ends, the second takes over by itself.
  store.reset();
  for (int wait = 0; wait < 200 && !second.stats().writing; ++wait)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_EQ(load_all(second, tokens), 24);
}

void make_foreign(const std::string& path,
                  const std::string& key,
                  const std::string& value,
                  bool other_family) {
  rocksdb::Options options;
  options.create_if_missing = true;
  rocksdb::DB* opened = nullptr;
  std::filesystem::create_directories(path);
  ASSERT_TRUE(rocksdb::DB::Open(options, path, &opened).ok());
  const std::unique_ptr<rocksdb::DB> db(opened);
  ASSERT_TRUE(db->Put({}, key, value).ok());
  if (!other_family) return;
  rocksdb::ColumnFamilyHandle* family = nullptr;
  ASSERT_TRUE(db->CreateColumnFamily({}, "something else", &family).ok());
  ASSERT_TRUE(db->DestroyColumnFamilyHandle(family).ok());
}

TEST(DiskStore, AForeignStoreIsMovedAsideOrLeftAsTheOptionSays) {
  const std::vector<int64_t> tokens = prompt(1, 3);
  for (const bool other_family : {false, true}) {
    for (const char* key : {"format", "somebody's key"}) {
      TemporaryFolder folder;
      make_foreign(folder.path() + "/db", key, "hadal prefix store 2", other_family);
      DiskStoreOptions options = disk_options(folder.path(), WindowPolicy::kZero);
      options.foreign = ForeignStore::kLeave;
      {
        DiskStore store(options);
        EXPECT_EQ(store.stats().state, DiskDb::State::kOff);
        save_all(store, tokens);
        store.flush();
        EXPECT_EQ(load_all(store, tokens), 0);
      }
      EXPECT_FALSE(std::filesystem::exists(folder.path() + "/foreign-1"));
      std::vector<std::string> families;
      ASSERT_TRUE(rocksdb::DB::ListColumnFamilies({}, folder.path() + "/db", &families).ok());
      EXPECT_EQ(families.size(), other_family ? 2u : 1u);
      options.foreign = ForeignStore::kMoveAside;
      DiskStore store(options);
      EXPECT_TRUE(store.stats().writing);
      EXPECT_EQ(store.stats().moved_aside, 1);
      EXPECT_TRUE(std::filesystem::exists(folder.path() + "/foreign-1/CURRENT"));
      save_all(store, tokens);
      store.flush();
      EXPECT_EQ(load_all(store, tokens), 24);
    }
  }
}

TEST(DiskStore, ThePolicyMayChangeBetweenStarts) {
  TemporaryFolder folder;
  const std::vector<int64_t> tokens = prompt(1, 6);
  for (const WindowPolicy policy : {WindowPolicy::kZero, WindowPolicy::kPeriodic,
                                    WindowPolicy::kFull, WindowPolicy::kPeriodic}) {
    DiskStore store(disk_options(folder.path(), policy));
    save_all(store, tokens);
    store.flush();
    EXPECT_EQ(load_all(store, tokens), 48);
    // Pages of the first start serve all.
    EXPECT_EQ(store.stats().of(RecordKind::kPage).written, policy == WindowPolicy::kZero ? 6 : 0);
  }
}

TEST(DiskStore, ManyCallersAtOnceWithATightBudgetAndAFailingDisk) {
  TemporaryFolder folder;
  const auto faults = std::make_shared<FaultyFileSystem>();
  const std::unique_ptr<rocksdb::Env> env = rocksdb::NewCompositeEnv(faults);
  DiskStoreOptions options = disk_options(folder.path(), WindowPolicy::kPeriodic);
  options.max_bytes = int64_t{1} << 19;
  options.env = env.get();
  DiskStore store(options);
  std::atomic<int64_t> found{0};
  std::vector<std::thread> callers;
  for (uint64_t caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&, caller] {
      std::mt19937_64 random(caller);
      for (int i = 0; i < 200; ++i) {
        const std::vector<int64_t> tokens = prompt(random() % 40, 6, random() % 3, 20);
        found += load_all(store, tokens);
        save_all(store, tokens);
        if (random() % 10 == 0) store.flush();
        if (random() % 30 == 0) faults->disk_full = !faults->disk_full;
        if (random() % 30 == 0) faults->short_reads = !faults->short_reads;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_GT(found, 0);
  faults->disk_full = faults->short_reads = false;
  for (int wait = 0; wait < 200 && !store.stats().writing; ++wait)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  for (int again = 0; again < 20 && load_all(store, prompt(1, 6)) < 48; ++again) {
    save_all(store, prompt(1, 6));
    store.flush();
  }
  EXPECT_EQ(load_all(store, prompt(1, 6)), 48);
}

TEST(DiskStore, ImpossibleOptionsAreRefused) {
  DiskStoreOptions options = disk_options("unused", WindowPolicy::kPeriodic);
  options.period = kPageTokens + 1;
  EXPECT_THROW(DiskStore store(options), InputError);
  options = disk_options("", WindowPolicy::kPeriodic);
  EXPECT_THROW(DiskStore store(options), InputError);
}

}  // namespace
}  // namespace hadal::engine_core
