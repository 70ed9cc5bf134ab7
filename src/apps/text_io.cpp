#include "apps/text_io.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sys/stat.h>
#include <unistd.h>

#include "base/check.h"

namespace hadal::apps {
namespace {

bool is_standard_input(const std::string& path) { return path.empty() || path == "-"; }

std::ifstream open(const std::string& path) {
  // A folder can be opened, and reading from it throws.
  std::error_code error;
  HADAL_INPUT_CHECK(!std::filesystem::is_directory(path, error), path, ": is a folder");
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  HADAL_INPUT_CHECK(file.good(), path, ": cannot be opened", errno != 0 ? ": " : "",
                    errno != 0 ? std::strerror(errno) : "");
  return file;
}

void check_standard_input() {
  struct stat status {};
  const bool folder = ::fstat(STDIN_FILENO, &status) == 0 && S_ISDIR(status.st_mode);
  HADAL_INPUT_CHECK(!folder, "standard input: is a folder");
}

}  // namespace

std::string read_input(const std::string& path) {
  if (is_standard_input(path)) check_standard_input();
  std::ifstream file;
  if (!is_standard_input(path)) file = open(path);
  std::istream& in = is_standard_input(path) ? std::cin : file;
  std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  HADAL_INPUT_CHECK(!in.bad(), is_standard_input(path) ? "standard input" : path,
                    ": cannot be read");
  return text;
}

void for_each_line(const std::string& path,
                   const std::function<void(const std::string& text, long number)>& line) {
  if (is_standard_input(path)) check_standard_input();
  std::ifstream file;
  if (!is_standard_input(path)) file = open(path);
  std::istream& in = is_standard_input(path) ? std::cin : file;
  std::string text;
  for (long number = 1; std::getline(in, text); ++number) {
    if (text.find_first_not_of(" \t\r") != std::string::npos) line(text, number);
  }
  HADAL_INPUT_CHECK(!in.bad(), is_standard_input(path) ? "standard input" : path,
                    ": cannot be read");
}

void write_output(std::string_view text) {
  errno = 0;
  const size_t written = std::fwrite(text.data(), 1, text.size(), stdout);
  HADAL_INPUT_CHECK(written == text.size() && std::fflush(stdout) == 0,
                    "standard output: cannot be written", errno != 0 ? ": " : "",
                    errno != 0 ? std::strerror(errno) : "");
}

}  // namespace hadal::apps
