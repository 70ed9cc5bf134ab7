// `hadal serve` as its clients and its operator meet it: the shipped model over a socket.
#include <csignal>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "cli_fixture.h"
#include "testing/loopback_client.h"

namespace hadal {
namespace {

using nlohmann::json;

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
      const size_t at = text.find("127.0.0.1:");
      if (at == std::string::npos || text.find(" at http") == std::string::npos) continue;
      port_ = static_cast<uint16_t>(std::stoi(text.substr(at + 10)));
      break;
    }
  }
  ~Server() {
    if (pid_ > 0) stop(SIGKILL);
    std::fclose(said_);
  }
  uint16_t port() const { return port_; }
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
  std::string log_;
};

class Serve : public CliFixture {};

json complete(const Server& server, const std::string& prompt, int max_tokens) {
  testing::LoopbackClient client(server.port());
  const json request = {
      {"prompt", prompt}, {"max_tokens", max_tokens}, {"temperature", 0.8}, {"seed", 5}};
  const testing::Reply reply = client.post("/v1/completions", request.dump());
  EXPECT_EQ(reply.status, 200) << reply.body;
  return json::parse(reply.body, nullptr, false);
}

TEST_F(Serve, AnswersWithTheTextThatGenerateWrites) {
  const std::string prompt = "It was a bright cold morning, and";
  const CliResult generated =
      run("generate --json --prompt '" + prompt + "' --max-tokens 24 --temperature 0.8 --seed 5");
  ASSERT_EQ(generated.code, 0) << generated.error;
  for (const char* drafts : {"0", "1"}) {
    Server server({"--max-drafts", drafts});
    ASSERT_NE(server.port(), 0) << server.log();
    EXPECT_EQ(complete(server, prompt, 24)["choices"][0]["text"],
              json::parse(generated.out)["text"]);
    EXPECT_EQ(server.stop(SIGTERM), 0);
  }
}

TEST_F(Serve, PrefixesOutliveAKill) {
  std::string prompt;
  for (int i = 0; i < 60; ++i) prompt += "The road went on through the wood for a long while. ";
  const std::vector<std::string> flags = {"--disk-cache", folder_ / "store"};
  json first;
  {
    Server server(flags);
    ASSERT_NE(server.port(), 0) << server.log();
    first = complete(server, prompt, 8);
    ::usleep(300'000);  // writing is behind
    EXPECT_EQ(server.stop(SIGKILL), -1);
  }
  Server server(flags);
  ASSERT_NE(server.port(), 0) << server.log();
  const json again = complete(server, prompt, 8);
  EXPECT_EQ(again["choices"], first["choices"]);
  EXPECT_GE(again["usage"]["prompt_tokens_details"]["disk_tokens"], 256);
}

TEST_F(Serve, RefusesWhatCannotBe) {
  expect_refused(run("serve --port 0 --api-keys /nowhere/keys"), "/nowhere/keys");
  expect_refused(run("serve --port 0 --disk-cache x --disk-policy some"), "--disk-policy");
  expect_refused(run("serve --port 0 --cache-gib 0.00001"), "cache");
  const CliResult tls = run("serve --port 0 --tls-certificate /nowhere.pem --tls-key /nowhere.pem");
  EXPECT_EQ(tls.code, 2);
  EXPECT_NE(tls.error.find("/nowhere.pem: cannot open"), std::string::npos) << tls.error;
}

}  // namespace
}  // namespace hadal
