// The hadal program as other programs call it: arguments and input in, output and exit code out.
#pragma once

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <sys/wait.h>
#include <unistd.h>

#include <gtest/gtest.h>

namespace hadal {

struct CliResult {
  int code = -1;
  std::string out;
  std::string error;
};

class CliFixture : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::temp_directory_path() /
              (std::string("hadal_") + info->test_suite_name() + "_" + info->name() + "_" +
               std::to_string(::getpid()));
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  static std::string slurp(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  }
  std::string write(const std::string& name, const std::string& content) const {
    const std::string path = folder_ / name;
    std::ofstream(path, std::ios::binary) << content;
    return path;
  }
  /// Runs the program with the text as standard input; `setup` stands before it on the command line.
  CliResult run(const std::string& arguments,
                const std::string& input = "",
                const std::string& setup = "",
                const std::string& binary = HADAL_BINARY) const {
    const std::string in = write("in", input);
    const std::string error = folder_ / "error";
    const std::string command =
        "OMP_NUM_THREADS=1 " + setup + " " + binary + " " + arguments + " < " + in + " 2> " + error;
    CliResult result;
    FILE* pipe = ::popen(command.c_str(), "r");
    if (pipe == nullptr) return result;
    std::array<char, 4096> buffer;
    while (const size_t n = std::fread(buffer.data(), 1, buffer.size(), pipe))
      result.out.append(buffer.data(), n);
    const int status = ::pclose(pipe);
    result.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    result.error = slurp(error);
    return result;
  }

  std::filesystem::path folder_;
};

/// Lines of standard error that are no log record, which begin with their time.
inline std::ptrdiff_t lines_said(const std::string& error) {
  std::istringstream lines(error);
  std::ptrdiff_t count = 0;
  for (std::string line; std::getline(lines, line);) count += line.starts_with("20") ? 0 : 1;
  return count;
}

/// Bad usage and bad input alike: exit code 2, nothing on standard output, one line that says why.
inline void expect_refused(const CliResult& result, const std::string& why) {
  EXPECT_EQ(result.code, 2) << result.out << result.error;
  EXPECT_EQ(result.out, "");
  EXPECT_NE(result.error.find(why), std::string::npos) << result.error;
  EXPECT_EQ(lines_said(result.error), 1) << result.error;
}

}  // namespace hadal
