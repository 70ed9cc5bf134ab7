// The hadal binary: picks the subcommand, owns the exit code.
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fcntl.h>
#include <filesystem>
#include <iostream>
#include <new>
#include <string>
#include <unistd.h>
#include <vector>

#include <CLI/CLI.hpp>

#include "apps/program.h"
#include "base/check.h"
#include "base/memory.h"

namespace {

/// A descriptor that the caller closed would be that of the next file, which messages would then
/// damage. Taken by one that can be neither read nor written to, so that writing still fails.
void occupy_standard_descriptors() {
  for (int fd = 0; fd < 3; ++fd) {
    if (::fcntl(fd, F_GETFD) >= 0 || errno != EBADF) continue;
    if (::open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY) != fd) return;
  }
}

/// Whatever a command printed has arrived, or the program says that it has not.
void finish_output() {
  std::cout.flush();
  const bool failed_before = std::ferror(stdout) != 0 || !std::cout;
  errno = 0;
  const bool fails_now = std::fflush(stdout) != 0;
  HADAL_INPUT_CHECK(!failed_before && !fails_now, "standard output: cannot be written",
                    fails_now && errno != 0 ? ": " : "",
                    fails_now && errno != 0 ? std::strerror(errno) : "");
}

int run(int argc, char** argv) {
  const std::unique_ptr<hadal::apps::Program> program = hadal::apps::make_program();
  int code = 0;
  try {
    program->app->parse(argc, argv);
    code = program->chosen();
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {
      program->app->exit(error);  // --help, --version
    } else {
      const std::vector<std::string> words(argv + 1, argv + argc);
      std::fprintf(stderr, "hadal: %s\n",
                   hadal::apps::refusal(*program->app, words, error).c_str());
      code = 2;
    }
  }
  finish_output();
  return code;
}

/// The reason alone: LibTorch's exceptions carry a stack trace behind it.
std::string first_line(const char* text) {
  const std::string whole = text;
  return whole.substr(0, whole.find('\n'));
}

int fail(int code, const std::string& what) {
  std::fflush(stdout);
  std::fprintf(stderr, "hadal: %s\n", what.c_str());
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  hadal::keep_freed_memory();
  occupy_standard_descriptors();
  try {
    return run(argc, argv);
  } catch (const hadal::InputError& error) {
    return fail(2, error.what());
  } catch (const std::filesystem::filesystem_error& error) {
    // Names that people gave: a link to itself, a folder that may not be read.
    return fail(2, hadal::concat(error.path1().string(), ": ", error.code().message()));
  } catch (const std::bad_alloc&) {
    return fail(2, "there is not enough memory");
  } catch (const std::exception& error) {
    return fail(3, "internal error: " + first_line(error.what()));
  }
}
