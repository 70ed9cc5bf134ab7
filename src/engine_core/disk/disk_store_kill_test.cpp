// SIGKILL at any moment: a child process writes and is killed, the next one checks all it finds.
#include <array>
#include <cstdlib>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "testing/disk_store_fixture.h"

namespace hadal::engine_core {
namespace {

using hadal::testing::disk_options;
using hadal::testing::load_all;
using hadal::testing::prompt;
using hadal::testing::save_all;
using hadal::testing::TemporaryFolder;

constexpr const char* kFolderVariable = "HADAL_DISK_STORE_TEST_FOLDER";
constexpr uint64_t kPrompts = 30;

/// The folder's name says the policy.
DiskStoreOptions killed_options(const std::string& folder) {
  DiskStoreOptions options = disk_options(
      folder, folder.ends_with("/full") ? WindowPolicy::kFull : WindowPolicy::kPeriodic);
  options.max_bytes = int64_t{1} << 19;  // evicts, compacts and drops blob files all the time
  return options;
}

std::vector<int64_t> numbered_prompt(uint64_t number) {
  return prompt(number, 2 + static_cast<int64_t>(number % 5), number % 4, 12);
}

std::string numbered_text(uint64_t number) {
  return std::string(1000 + 100 * number, static_cast<char>('a' + number % 26));
}

/// Tokens found, after a check of every byte.
int64_t check_everything(DiskStore& store) {
  int64_t found = 0;
  for (uint64_t number = 0; number < kPrompts; ++number)
    found += load_all(store, numbered_prompt(number));
  for (uint64_t number = 0; number < kPrompts; ++number) {
    const std::optional<std::string> text = store.get_text(concat("text ", number));
    EXPECT_TRUE(!text || *text == numbered_text(number)) << number;
  }
  EXPECT_EQ(store.stats().damaged, 0);
  EXPECT_EQ(store.stats().moved_aside, 0);
  EXPECT_TRUE(store.stats().writing);
  return found;
}

/// Run by the test below in a process of its own: RocksDB's threads do not survive fork().
TEST(DiskStoreKill, DISABLED_Child) {
  const char* folder = std::getenv(kFolderVariable);
  ASSERT_NE(folder, nullptr) << "run by another test only";
  DiskStore store(killed_options(folder));
  check_everything(store);
  if (HasFailure()) return;
  std::mt19937_64 random(static_cast<uint64_t>(::getpid()));
  ASSERT_EQ(::write(STDOUT_FILENO, "!", 1), 1);
  while (!HasFailure()) {
    const std::vector<int64_t> tokens = numbered_prompt(random() % kPrompts);
    load_all(store, tokens);
    save_all(store, tokens);
    const uint64_t number = random() % kPrompts;
    if (random() % 4 == 0) store.erase_text(concat("text ", number));
    store.put_text(concat("text ", number), numbered_text(number));
  }
}

class Child {
 public:
  explicit Child(const std::string& folder) {
    std::array<int, 2> ends{};
    EXPECT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
    ::setenv(kFolderVariable, folder.c_str(), 1);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::dup2(ends[1], STDOUT_FILENO);
      ::execl("/proc/self/exe", "core_test", "--gtest_filter=DiskStoreKill.DISABLED_Child",
              "--gtest_also_run_disabled_tests", "--gtest_brief=1", nullptr);
      ::_exit(127);
    }
    ::unsetenv(kFolderVariable);
    ::close(ends[1]);
    output_ = ends[0];
  }
  ~Child() { ::close(output_); }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  /// What it prints, up to the mark that its checks passed or to its end.
  std::string wait_for_mark() const {
    std::string text;
    char byte = 0;
    while (::read(output_, &byte, 1) == 1) {
      if (byte == '!') return "";
      text += byte;
    }
    return text + "(ended)";
  }
  void kill() const { ::kill(pid_, SIGKILL); }
  bool was_killed() const {
    int status = 0;
    EXPECT_EQ(::waitpid(pid_, &status, 0), pid_);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
  }

 private:
  pid_t pid_ = -1;
  int output_ = -1;
};

void kill_again_and_again(const std::string& folder, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (int round = 0; round < 25; ++round) {
    const Child child(folder);
    // Every fourth is killed while it starts, opens or checks.
    const std::string trouble = round % 4 == 3 ? "" : child.wait_for_mark();
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 30'000));
    child.kill();
    ASSERT_TRUE(child.was_killed() && trouble.empty()) << "round " << round << ": " << trouble;
  }
  DiskStore store(killed_options(folder));
  EXPECT_GT(check_everything(store), 0);
  EXPECT_FALSE(std::filesystem::exists(folder + "/damaged-1"));
}

TEST(DiskStoreKill, TwentyFiveKillsCorruptNothingUnderFull) {
  TemporaryFolder folder;
  kill_again_and_again(folder.path() + "/full", 17);
}

TEST(DiskStoreKill, TwentyFiveKillsCorruptNothingUnderPeriodic) {
  TemporaryFolder folder;
  kill_again_and_again(folder.path() + "/periodic", 18);
}

}  // namespace
}  // namespace hadal::engine_core
