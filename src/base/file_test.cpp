#include "base/file.h"

#include <filesystem>
#include <memory>
#include <span>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal {
namespace {

namespace fs = std::filesystem;

class FileTest : public ::testing::Test {
 protected:
  FileTest() {
    std::string name = (fs::temp_directory_path() / "hadal-file-XXXXXX").string();
    root_ = ::mkdtemp(name.data());
  }
  ~FileTest() override { fs::remove_all(root_); }
  std::string path(const std::string& name) const { return (root_ / name).string(); }
  int64_t num_entries() const {
    return std::distance(fs::directory_iterator(root_), fs::directory_iterator());
  }
  fs::path root_;
};

TEST_F(FileTest, WrittenContentIsReadAndMapped) {
  const std::string content("a\0b\n", 4);
  write_file_atomic(path("x"), content);
  EXPECT_EQ(read_file(path("x")), content);
  const MappedFile mapped(path("x"));
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(mapped.bytes().data()), 4), content);
  EXPECT_EQ(mapped.bytes().size(), 4u);
  EXPECT_EQ(num_entries(), 1);
}

TEST_F(FileTest, PartsAreReadBesideTheMapping) {
  write_file_atomic(path("x"), "0123456789");
  const MappedFile mapped(path("x"));
  std::string part(4, ' ');
  const auto to = std::as_writable_bytes(std::span(part));
  mapped.read(3, to);
  EXPECT_EQ(part, "3456");
  mapped.read(10, to.first(0));
  EXPECT_THROW(mapped.read(7, to), InputError);
  EXPECT_THROW(mapped.read(11, to.first(0)), InputError);
  fs::resize_file(path("x"), 5);
  EXPECT_THROW(mapped.read(3, to), InputError);
}

TEST_F(FileTest, EmptyFileIsEmptyRange) {
  write_file_atomic(path("x"), "");
  EXPECT_TRUE(MappedFile(path("x")).bytes().empty());
  EXPECT_EQ(read_file(path("x")), "");
}

TEST_F(FileTest, MappingSurvivesMoveAndReplacement) {
  write_file_atomic(path("x"), "old");
  MappedFile first(path("x"));
  write_file_atomic(path("x"), "newer");
  const MappedFile second(std::move(first));
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(second.bytes().data()), 3), "old");
  EXPECT_EQ(read_file(path("x")), "newer");
}

TEST_F(FileTest, UncommittedFileLeavesTheOldContentAndNothingElse) {
  write_file_atomic(path("x"), "old");
  {
    AtomicFile file(path("x"));
    file.write("half");
    EXPECT_EQ(read_file(path("x")), "old");
  }
  EXPECT_EQ(read_file(path("x")), "old");
  EXPECT_EQ(num_entries(), 1);
}

TEST_F(FileTest, DirectoryAppearsWholeOrNotAtAll) {
  {
    AtomicDirectory directory(path("d/"));
    write_file_atomic(directory.temporary() + "/a", "1");
    EXPECT_FALSE(fs::exists(path("d")));
  }
  EXPECT_EQ(num_entries(), 0);
  AtomicDirectory directory(path("d"));
  write_file_atomic(directory.temporary() + "/a", "1");
  directory.commit();
  EXPECT_EQ(read_file(path("d/a")), "1");
  EXPECT_EQ(num_entries(), 1);
  EXPECT_THROW(AtomicDirectory{path("d")}, InputError);
}

TEST_F(FileTest, ErrorsNamePathAndReason) {
  try {
    MappedFile file(path("absent"));
    FAIL();
  } catch (const InputError& error) {
    EXPECT_NE(std::string(error.what()).find("absent: cannot open: No such file"),
              std::string::npos)
        << error.what();
  }
  EXPECT_THROW(read_file(root_.string()), InputError);
  EXPECT_THROW(MappedFile{root_.string()}, InputError);
  EXPECT_THROW(write_file_atomic(path("no/such/folder"), "x"), InputError);
  write_file_atomic(path("x"), "12345");
  EXPECT_THROW(read_file(path("x"), 4), InputError);
}

TEST_F(FileTest, LockExcludesASecondHolder) {
  auto lock = std::make_unique<FileLock>(path("lock"));
  EXPECT_THROW(FileLock{path("lock")}, InputError);
  lock.reset();
  EXPECT_NO_THROW(FileLock{path("lock")});
}

}  // namespace
}  // namespace hadal
