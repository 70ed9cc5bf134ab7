// What `hadal serve` takes of the machine's memory is what it said it would.
#include <cstdio>
#include <fstream>
#include <signal.h>
#include <sstream>
#include <string>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "testing/loopback_client.h"

namespace hadal {
namespace {

using nlohmann::json;

constexpr int64_t kMiB = int64_t{1} << 20;

/// A server of the shipped model with a cache of so many MiB.
class Server {
 public:
  explicit Server(int64_t mib) {
    int ends[2];
    EXPECT_EQ(::pipe(ends), 0);
    const std::string gib = std::to_string(static_cast<double>(mib) / 1024);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::dup2(ends[1], STDERR_FILENO);
      ::execl(HADAL_BINARY, HADAL_BINARY, "serve", "--port", "0", "--cache-gib", gib.c_str(),
              nullptr);
      ::_exit(127);
    }
    ::close(ends[1]);
    said_ = ::fdopen(ends[0], "r");
    char line[1024];
    while (std::fgets(line, sizeof(line), said_) != nullptr) {
      log_ += line;
      const size_t at = std::string(line).find("127.0.0.1:");
      if (at == std::string::npos || std::string(line).find(" at http") == std::string::npos)
        continue;
      port_ = static_cast<uint16_t>(std::stoi(std::string(line).substr(at + 10)));
      break;
    }
  }
  ~Server() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    std::fclose(said_);
  }
  const std::string& log() const { return log_; }
  int64_t resident() const {
    std::ifstream file("/proc/" + std::to_string(pid_) + "/statm");
    int64_t size = 0, resident = 0;
    file >> size >> resident;
    return resident * ::sysconf(_SC_PAGESIZE);
  }
  int64_t metric(const std::string& name) const {
    testing::LoopbackClient client(port_);
    std::istringstream lines(client.get("/metrics").body);
    for (std::string line; std::getline(lines, line);)
      if (line.starts_with("hadal_" + name + " ")) return std::stoll(line.substr(name.size() + 7));
    ADD_FAILURE() << "no metric " << name;
    return 0;
  }
  int64_t stated() const {
    return metric("weights_bytes") + metric("cache_bytes") + metric("workspace_bytes");
  }
  json complete(const std::vector<int64_t>& prompt) const {
    testing::LoopbackClient client(port_);
    const json request = {{"prompt", prompt}, {"max_tokens", 2}, {"temperature", 0}};
    const testing::Reply reply = client.post("/v1/completions", request.dump());
    EXPECT_EQ(reply.status, 200) << reply.body;
    return json::parse(reply.body, nullptr, false);
  }

 private:
  pid_t pid_ = 0;
  FILE* said_ = nullptr;
  uint16_t port_ = 0;
  std::string log_;
};

class ServeMemory : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!std::ifstream("/proc/self/statm").good()) GTEST_SKIP() << "no /proc";
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    GTEST_SKIP() << "sanitizers take memory of their own";
#endif
  }
  static void expect_as_stated(const Server& server) {
    const auto resident = static_cast<double>(server.resident());
    const auto stated = static_cast<double>(server.stated());
    EXPECT_NEAR(resident / stated, 1.0, 0.08) << resident << " bytes in memory, stated " << stated;
  }
};

// Conversations of several times the cache, then a rest.
TEST_F(ServeMemory, IsWhatTheFlagSaysAtTheStartAndAfterMuchTraffic) {
  for (const int64_t mib : {20, 64}) {
    const Server server(mib);
    EXPECT_NE(server.log().find("conversations of 5000 tokens fit"), std::string::npos);
    EXPECT_LE(server.metric("cache_bytes"), mib * kMiB);
    EXPECT_GE(server.metric("cache_bytes"), mib * kMiB * 97 / 100);
    expect_as_stated(server);
    for (int64_t talk = 0; talk < mib / 2; ++talk) {
      std::vector<int64_t> prompt;
      for (int64_t i = 0; i < 1500; ++i) prompt.push_back(10 + (i * i + talk * 977) % 8000);
      for (int turn = 0; turn < 2; ++turn) {
        const json usage = server.complete(prompt)["usage"]["prompt_tokens_details"];
        EXPECT_EQ(usage["cached_tokens"], turn == 0 ? 0 : 1499);  // the last was never kept
        EXPECT_EQ(usage["miss_reason"], turn == 0 ? "new" : "none");
        prompt.insert(prompt.end(), {11, 12, 13});
      }
    }
    EXPECT_GT(server.metric("states_evicted_total"), 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(2500));
    expect_as_stated(server);
    if (mib == 20) {
      EXPECT_LE(server.resident(), 210 * kMiB) << "with a cache of 20 MiB; it was 227";
    }
  }
}

}  // namespace
}  // namespace hadal
