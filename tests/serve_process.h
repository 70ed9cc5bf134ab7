// `hadal serve` as a process of its own.
#pragma once

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

namespace hadal::testing {

/// A running server; its port is read from what it says.
class Server {
 public:
  explicit Server(std::vector<std::string> flags) {
    int ends[2];
    EXPECT_EQ(::pipe(ends), 0);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::dup2(ends[1], STDERR_FILENO);
      std::vector<std::string> words = {HADAL_BINARY, "serve", "--port", "0"};
      words.insert(words.end(), flags.begin(), flags.end());
      std::vector<char*> arguments;
      for (std::string& word : words) arguments.push_back(word.data());
      arguments.push_back(nullptr);
      ::execv(HADAL_BINARY, arguments.data());
      ::_exit(127);
    }
    ::close(ends[1]);
    said_ = ::fdopen(ends[0], "r");
    char line[1024];
    while (std::fgets(line, sizeof(line), said_) != nullptr) {
      log_ += line;
      const std::string text = line;
      const size_t at = text.find(" at http");
      if (at == std::string::npos) continue;
      url_ = text.substr(at + 4, text.find(',', at) - at - 4);
      port_ = static_cast<uint16_t>(std::stoi(url_.substr(url_.rfind(':') + 1)));
      break;
    }
  }
  ~Server() {
    if (pid_ > 0) stop(SIGKILL);
    std::fclose(said_);
  }
  uint16_t port() const { return port_; }
  const std::string& url() const { return url_; }
  const std::string& log() const { return log_; }
  /// The exit code; -1 when a signal ended it.
  int stop(int signal) {
    ::kill(pid_, signal);
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

 private:
  pid_t pid_ = 0;
  FILE* said_ = nullptr;
  uint16_t port_ = 0;
  std::string url_, log_;
};

}  // namespace hadal::testing
