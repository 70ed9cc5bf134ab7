// A disk that is full: by what the store writes, by what others write, at any moment and at the
// start. The process goes on, what comes back is right or a miss, and one line tells.
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <functional>
#include <sys/mount.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "testing/disk_store_fixture.h"

namespace hadal::engine_core {
namespace {

using hadal::testing::disk_options;
using hadal::testing::load_all;
using hadal::testing::prompt;
using hadal::testing::save_all;
using hadal::testing::TemporaryFolder;

constexpr const char* kFolderVariable = "HADAL_FULL_DISK_TEST_FOLDER";

/// A file system of its own, as large as told.
class SmallFileSystem {
 public:
  explicit SmallFileSystem(int64_t mib) {
    const std::string size = "size=" + std::to_string(mib) + "m";
    mounted_ = ::mount("tmpfs", folder_.path().c_str(), "tmpfs", 0, size.c_str()) == 0;
  }
  ~SmallFileSystem() {
    if (mounted_) ::umount2(folder_.path().c_str(), MNT_DETACH);
  }
  bool mounted() const { return mounted_; }
  const std::string& path() const { return folder_.path(); }
  int64_t free_bytes() const {
    struct statvfs now {};
    EXPECT_EQ(::statvfs(path().c_str(), &now), 0);
    return static_cast<int64_t>(now.f_bavail * now.f_frsize);
  }
  /// Somebody else's file takes all but so many bytes.
  void leave(int64_t bytes) const {
    std::filesystem::remove(path() + "/other");
    const int64_t size = free_bytes() - bytes;
    if (size <= 0) return;
    const int file = ::open((path() + "/other").c_str(), O_CREAT | O_WRONLY, 0600);
    ::posix_fallocate(file, 0, size);  // the store may be faster
    ::close(file);
  }

 private:
  TemporaryFolder folder_;
  bool mounted_ = false;
};

DiskStoreOptions full_options(const std::string& folder) {
  DiskStoreOptions options = disk_options(folder, WindowPolicy::kPeriodic);
  options.max_bytes = int64_t{256} << 20;
  return options;
}

/// Run by the tests below in a process of its own: it writes far more than there is room for, while
/// somebody fills and empties the disk.
TEST(DiskStoreFull, DISABLED_Child) {
  const char* folder = std::getenv(kFolderVariable);
  ASSERT_NE(folder, nullptr) << "run by another test only";
  DiskStore store(full_options(std::string(folder) + "/store"));
  std::mt19937_64 random(static_cast<uint64_t>(::getpid()));
  for (int i = 0; i < 400; ++i) {
    const std::vector<int64_t> tokens =
        prompt(random() % 500, 6 + static_cast<int64_t>(random() % 20));
    load_all(store, tokens);  // checks every byte
    save_all(store, tokens);
    if (random() % 8 == 0) store.flush();
  }
  store.flush();
}

struct Ended {
  bool well = false;
  std::string output;
  int64_t lines(const std::string& with) const {
    int64_t count = 0;
    for (size_t at = 0; (at = output.find(with, at)) != std::string::npos; ++at) ++count;
    return count;
  }
  /// One warning each time that writing stops, and nothing else.
  bool told_once() const {
    return lines(" W ") <= 1 + lines(": writing again") && lines(" E ") == 0;
  }
};

Ended run_child(const std::string& folder, const std::function<void()>& meanwhile = {}) {
  std::array<int, 2> ends{};
  EXPECT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
  ::setenv(kFolderVariable, folder.c_str(), 1);
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::dup2(ends[1], STDOUT_FILENO);
    ::dup2(ends[1], STDERR_FILENO);
    ::execl("/proc/self/exe", "core_test", "--gtest_filter=DiskStoreFull.DISABLED_Child",
            "--gtest_also_run_disabled_tests", "--gtest_brief=1", nullptr);
    ::_exit(127);
  }
  ::unsetenv(kFolderVariable);
  ::close(ends[1]);
  if (meanwhile) meanwhile();
  Ended ended;
  std::array<char, 4096> buffer;
  for (ssize_t got = 0; (got = ::read(ends[0], buffer.data(), buffer.size())) > 0;)
    ended.output.append(buffer.data(), static_cast<size_t>(got));
  ::close(ends[0]);
  int status = 0;
  EXPECT_EQ(::waitpid(pid, &status, 0), pid);
  ended.well = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  return ended;
}

constexpr int kStarts = 25;

TEST(DiskStoreFull, FilledByTheStoreItselfItStartsAgainAndAgain) {
  const SmallFileSystem disk(20);
  if (!disk.mounted()) GTEST_SKIP() << "no right to mount a file system: " << std::strerror(errno);
  for (int start = 0; start < kStarts; ++start) {
    const Ended ended = run_child(disk.path());
    ASSERT_TRUE(ended.well) << "start " << start << ":\n" << ended.output;
    ASSERT_TRUE(ended.told_once()) << ended.output;
  }
  // What was written before the disk was full is still there.
  DiskStore store(full_options(disk.path() + "/store"));
  int64_t found = 0;
  for (uint64_t seed = 0; seed < 500; ++seed) found += load_all(store, prompt(seed, 6));
  EXPECT_GT(found, 0);
  EXPECT_EQ(store.stats().moved_aside, 0);
}

TEST(DiskStoreFull, FilledByAnotherProgramAtAnyMoment) {
  const SmallFileSystem disk(20);
  if (!disk.mounted()) GTEST_SKIP() << "no right to mount a file system: " << std::strerror(errno);
  std::mt19937_64 random(23);
  for (int start = 0; start < kStarts; ++start) {
    // Now and then the store begins with everything taken, down to the last byte.
    disk.leave(start % 3 == 0 ? static_cast<int64_t>(random() % 3) * 4096 : int64_t{20} << 20);
    const Ended ended = run_child(disk.path(), [&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(random() % 60));
      disk.leave(static_cast<int64_t>(random() % 2) * 4096);
      std::this_thread::sleep_for(std::chrono::milliseconds(random() % 60));
    });
    ASSERT_TRUE(ended.well) << "start " << start << ":\n" << ended.output;
    ASSERT_TRUE(ended.told_once()) << ended.output;
  }
  std::filesystem::remove(disk.path() + "/other");
  DiskStore store(full_options(disk.path() + "/store"));
  EXPECT_EQ(store.stats().damaged, 0);
  EXPECT_EQ(store.stats().moved_aside, 0);
}

// The disk is full from the n-th change of a file on, all through a short life: opening,
// writing, flushing, compacting, closing. Afterwards the files are what they were at that moment.
TEST(DiskStoreFull, EveryChangeOfAFileMayBeTheOneThatIsRefused) {
  const std::vector<int64_t> before = prompt(1, 6), during = prompt(2, 6), after = prompt(3, 6);
  bool reached = true;
  int moment = 0;
  for (; reached; moment += moment < 12 ? 1 : 5) {
    TemporaryFolder folder;
    const auto faults = std::make_shared<hadal::testing::FaultyFileSystem>();
    const std::unique_ptr<rocksdb::Env> env = rocksdb::NewCompositeEnv(faults);
    DiskStoreOptions options = disk_options(folder.path(), WindowPolicy::kPeriodic);
    options.retry = std::chrono::hours(1);
    options.max_bytes = 100'000;  // evicts and compacts
    {
      DiskStore store(options);
      save_all(store, before);
    }
    options.env = env.get();
    faults->full_after = moment;
    {
      DiskStore store(options);
      for (uint64_t more = 0; more < 6; ++more) {
        save_all(store, more == 0 ? during : prompt(100 + more, 6));
        store.flush();
        load_all(store, during);  // right or a miss
      }
      load_all(store, before);  // the same; what is older may have been evicted
    }
    reached = faults->disk_full;
    options.env = nullptr;
    DiskStore store(options);
    ASSERT_TRUE(store.stats().writing) << "full at change " << moment;
    ASSERT_EQ(store.stats().damaged, 0) << "full at change " << moment;
    ASSERT_EQ(store.stats().moved_aside, 0) << "full at change " << moment;
    save_all(store, after);
    store.flush();
    ASSERT_EQ(load_all(store, after), 48);
  }
  EXPECT_GT(moment, 40);
}

}  // namespace
}  // namespace hadal::engine_core
