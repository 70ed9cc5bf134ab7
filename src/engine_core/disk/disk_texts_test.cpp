// Texts in the disk store: there at once and after a restart, one budget with the prefixes, and
// whatever happens to the disk is a text that is not there.
#include <rocksdb/env.h>
#include <thread>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/log.h"
#include "testing/disk_store_fixture.h"

namespace hadal::engine_core {
namespace {

using hadal::testing::disk_options;
using hadal::testing::FaultyFileSystem;
using hadal::testing::load_all;
using hadal::testing::prompt;
using hadal::testing::save_all;
using hadal::testing::TemporaryFolder;

std::string text_of(int number, size_t size = 3000) {
  std::string text;
  while (text.size() < size) text += concat("text ", number, " ", text.size(), "\n");
  return text;
}
std::string name_of(int number) { return concat("resp_", number); }

class DiskTexts : public ::testing::Test {
 protected:
  DiskStoreOptions options() {
    DiskStoreOptions options = disk_options(folder_.path(), WindowPolicy::kPeriodic);
    return options;
  }
  TemporaryFolder folder_;
};

TEST_F(DiskTexts, AreThereAtOnceAndAfterARestart) {
  {
    DiskStore store(options());
    EXPECT_FALSE(store.get_text("resp_1"));
    EXPECT_TRUE(store.put_text("resp_1", text_of(1)));
    EXPECT_EQ(store.get_text("resp_1"), text_of(1)) << "not written yet";
    EXPECT_FALSE(store.put_text("resp_1", "another")) << "a name has one text";
    EXPECT_TRUE(store.put_text("empty", ""));
    EXPECT_TRUE(store.put_text("bytes", std::string("\0\xff", 2)));
    EXPECT_TRUE(store.put_text("gone", "x"));
    EXPECT_TRUE(store.erase_text("gone"));
    EXPECT_FALSE(store.get_text("gone"));
    store.flush();
    EXPECT_EQ(store.get_text("resp_1"), text_of(1)) << "from the disk";
    // "gone" may have been written before it went.
    EXPECT_GE(store.stats().of(RecordKind::kText).written_bytes, std::ssize(text_of(1)) + 2);
    EXPECT_GE(store.stats().of(RecordKind::kText).read_bytes, std::ssize(text_of(1)));
  }
  // Whatever model comes next.
  DiskStoreOptions other = options();
  other.identity = "another model";
  DiskStore store(other);
  EXPECT_EQ(store.get_text("resp_1"), text_of(1));
  EXPECT_EQ(store.get_text("empty"), "");
  EXPECT_EQ(store.get_text("bytes"), std::string("\0\xff", 2));
  EXPECT_FALSE(store.get_text("gone"));
  EXPECT_TRUE(store.erase_text("resp_1"));
  EXPECT_FALSE(store.erase_text("resp_1"));
  EXPECT_TRUE(store.put_text("resp_1", "new")) << "its name is free";
  EXPECT_EQ(store.get_text("resp_1"), "new");
  store.flush();
  EXPECT_EQ(store.get_text("resp_1"), "new");
}

TEST_F(DiskTexts, HaveOneBudgetWithThePrefixes) {
  DiskStoreOptions small = options();
  small.max_bytes = 100'000;
  DiskStore store(small);
  EXPECT_FALSE(store.put_text("large", std::string(100'000, 'x')));
  store.put_text(name_of(0), text_of(0));
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    const std::vector<int64_t> tokens = prompt(seed, 4);
    save_all(store, tokens);
    store.put_text(name_of(static_cast<int>(seed)), text_of(static_cast<int>(seed)));
    store.flush();
    EXPECT_TRUE(store.get_text(name_of(0))) << "it is read all the time";
    EXPECT_EQ(load_all(store, tokens), std::ssize(tokens));
  }
  EXPECT_LE(store.stats().bytes, small.max_bytes);
  int kept = 0;
  for (int number = 1; number <= 30; ++number) {
    const auto text = store.get_text(name_of(number));
    if (text) {
      ++kept;
      EXPECT_EQ(*text, text_of(number));
    }
  }
  EXPECT_GT(kept, 1);
  EXPECT_LT(kept, 20);
  EXPECT_FALSE(store.get_text(name_of(1)));
  EXPECT_TRUE(store.get_text(name_of(30)));
}

class FaultyDiskTexts : public DiskTexts {
 protected:
  FaultyDiskTexts()
      : faults_(std::make_shared<FaultyFileSystem>()), env_(rocksdb::NewCompositeEnv(faults_)) {
    log::set_level(log::Level::kError);
  }
  ~FaultyDiskTexts() override { log::set_level(log::Level::kInfo); }
  DiskStoreOptions faulty() {
    DiskStoreOptions options = DiskTexts::options();
    options.env = env_.get();
    return options;
  }
  static bool wait_writing(const DiskStore& store, bool writing) {
    for (int i = 0; i < 500 && store.stats().writing != writing; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    return store.stats().writing == writing;
  }
  std::shared_ptr<FaultyFileSystem> faults_;
  std::unique_ptr<rocksdb::Env> env_;
};

TEST_F(FaultyDiskTexts, OnAFullDiskNothingFails) {
  DiskStore store(faulty());
  ASSERT_TRUE(store.put_text("before", text_of(1)));
  ASSERT_TRUE(store.put_text("erased", text_of(2)));
  store.flush();
  faults_->disk_full = true;
  EXPECT_TRUE(store.put_text("lost", text_of(3))) << "nobody knows yet";
  store.flush();
  ASSERT_TRUE(wait_writing(store, false));
  EXPECT_FALSE(store.get_text("lost"));
  EXPECT_FALSE(store.put_text("refused", text_of(4)));
  EXPECT_EQ(store.get_text("before"), text_of(1)) << "what is there is read";
  EXPECT_TRUE(store.erase_text("erased"));
  EXPECT_FALSE(store.get_text("erased"));
  faults_->disk_full = false;
  ASSERT_TRUE(wait_writing(store, true));
  EXPECT_FALSE(store.get_text("erased")) << "it does not come back";
  EXPECT_TRUE(store.put_text("after", text_of(5)));
  store.flush();
  EXPECT_EQ(store.get_text("after"), text_of(5));
  EXPECT_EQ(store.get_text("before"), text_of(1));
}

TEST_F(FaultyDiskTexts, DamageIsAMiss) {
  {
    DiskStore store(faulty());
    for (int number = 0; number < 8; ++number) store.put_text(name_of(number), text_of(number));
  }
  DiskStore store(faulty());
  faults_->flipped_reads = true;
  for (int number = 0; number < 8; ++number) {
    const auto text = store.get_text(name_of(number));
    EXPECT_TRUE(!text || *text == text_of(number)) << "never another text";
  }
  faults_->flipped_reads = false;
  store.flush();
  EXPECT_TRUE(store.put_text("new", "x"));
  EXPECT_EQ(store.get_text("new"), "x");
}

}  // namespace
}  // namespace hadal::engine_core
