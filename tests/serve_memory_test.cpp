// What `hadal serve` takes of the machine's memory is what it said it would.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
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
    return metric("weights_bytes") + metric("cache_bytes") + metric("workspace_bytes") +
           metric("grammar_bytes");
  }
  json complete(const std::vector<int64_t>& prompt) const {
    return post("/v1/completions", {{"prompt", prompt}, {"max_tokens", 2}, {"temperature", 0}});
  }
  json post(const std::string& path, const json& request) const {
    testing::LoopbackClient client(port_);
    const testing::Reply reply = client.post(path, request.dump());
    EXPECT_EQ(reply.status, 200) << reply.body;
    return json::parse(reply.body, nullptr, false);
  }
  uint16_t port() const { return port_; }

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
  /// Within 3 % once the server rests, a second after it has nothing to do.
  static void expect_as_stated(const Server& server) {
    // Weights in files may have left memory where others need it: rows of the whole embedding.
    std::vector<int64_t> prompt;
    for (int64_t id = 10; id < 8190; id += 40) prompt.push_back(id);
    server.complete(prompt);
    const auto stated = static_cast<double>(server.stated());
    double resident = 0;
    for (int tries = 0; tries < 40; ++tries) {
      std::this_thread::sleep_for(std::chrono::milliseconds(250));
      resident = static_cast<double>(server.resident());
      if (std::abs(resident / stated - 1) <= 0.03) break;
    }
    EXPECT_NEAR(resident / stated, 1.0, 0.03) << resident << " bytes in memory, stated " << stated;
  }
  /// `count` times `work` of 0, 1, .. on `threads` threads.
  static void at_once(int threads, int count, const std::function<void(int)>& work) {
    std::atomic<int> next{0};
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; ++thread)
      running.emplace_back([&] {
        for (int i = next++; i < count; i = next++) work(i);
      });
    for (std::thread& thread : running) thread.join();
  }
  static json story(int number) {
    const std::string text = "Tell me a story of number " + std::to_string(number);
    return {{"messages", {{{"role", "user"}, {"content", text}}}}, {"max_tokens", 24}};
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
    expect_as_stated(server);
    if (mib == 20) {
      EXPECT_LE(server.resident(), 168 * kMiB);
    }
  }
}

// What takes memory beside the cache: streams, schemas, long prompts, bodies, connections.
TEST_F(ServeMemory, IsWhatTheFlagSaysAfterTrafficOfEveryKind) {
  const Server server(20);
  at_once(16, 48, [&](int i) {
    json request = story(i);
    request["stream"] = i % 2 == 0;
    testing::LoopbackClient client(server.port());
    EXPECT_EQ(client.post("/v1/chat/completions", request.dump()).status, 200);
  });
  at_once(4, 32, [&](int i) {
    json properties;
    for (int j = 0; j < 6; ++j)
      properties["k" + std::to_string(i) + "_" + std::to_string(j)] = {
          {"type", j % 2 == 0 ? "string" : "integer"}};
    json request = story(i);
    request["response_format"] = {
        {"type", "json_schema"},
        {"json_schema",
         {{"name", "x"}, {"schema", {{"type", "object"}, {"properties", properties}}}}}};
    server.post("/v1/chat/completions", request);
  });
  EXPECT_GT(server.metric("grammar_bytes"), 0);
  std::vector<int64_t> prompt;
  for (int64_t piece = 0; piece < 6; ++piece) {  // the client waits 10 s for an answer, not more
    for (int64_t i = 0; i < 1300; ++i) prompt.push_back(10 + (i * i + piece * 977) % 8000);
    server.complete(prompt);
  }
  std::string words;
  for (int i = 0; i < 60'000; ++i) words += "Some words that are long enough. ";
  at_once(4, 8, [&](int) { server.post("/tokenize", {{"prompt", words}}); });
  {
    std::vector<std::unique_ptr<testing::LoopbackClient>> clients;
    for (int i = 0; i < 300; ++i) {
      clients.push_back(std::make_unique<testing::LoopbackClient>(server.port()));
      EXPECT_EQ(clients.back()->get("/health").status, 200);
    }
  }
  expect_as_stated(server);
  EXPECT_LE(server.resident(), 168 * kMiB);
}

}  // namespace
}  // namespace hadal
