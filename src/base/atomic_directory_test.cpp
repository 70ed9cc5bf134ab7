// What killed processes leave behind is removed by the next one; what living ones write is not.
#include <csignal>
#include <filesystem>
#include <sys/wait.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/file.h"

namespace hadal {
namespace {

namespace fs = std::filesystem;

class AbandonedDirectory : public ::testing::Test {
 protected:
  void SetUp() override {
    base_ = ::testing::TempDir() + "hadal-abandoned-" + std::to_string(getpid());
    fs::remove_all(base_);
    fs::create_directories(base_);
  }
  void TearDown() override { fs::remove_all(base_); }

  size_t num_entries() const {
    return static_cast<size_t>(
        std::distance(fs::directory_iterator(base_), fs::directory_iterator()));
  }

  std::string base_;
};

TEST_F(AbandonedDirectory, IsRemovedByTheNextRun) {
  const std::string target = base_ + "/out";
  const pid_t child = ::fork();
  if (child == 0) {
    const AtomicDirectory directory(target);
    write_file_atomic(directory.temporary() + "/half", "of it");
    ::kill(::getpid(), SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  ASSERT_EQ(num_entries(), 1u);
  fs::create_directories(base_ + "/other.tmp-abcdef");
  fs::create_directories(base_ + "/out.tmp-kept-by-somebody");
  {
    AtomicDirectory directory(target);
    EXPECT_EQ(num_entries(), 3u);
    directory.commit();
  }
  EXPECT_TRUE(fs::exists(target));
  EXPECT_TRUE(fs::exists(base_ + "/other.tmp-abcdef"));
  EXPECT_TRUE(fs::exists(base_ + "/out.tmp-kept-by-somebody"));
}

TEST_F(AbandonedDirectory, ALivingOneStays) {
  const std::string target = base_ + "/out";
  AtomicDirectory first(target);
  write_file_atomic(first.temporary() + "/a", "first");
  {
    const AtomicDirectory second(target);
    EXPECT_EQ(num_entries(), 2u);
    EXPECT_TRUE(fs::exists(first.temporary() + "/a"));
  }
  first.commit();
  EXPECT_EQ(read_file(target + "/a"), "first");
  EXPECT_EQ(num_entries(), 1u);
}

}  // namespace
}  // namespace hadal
