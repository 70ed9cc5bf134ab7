// hadal bench serve against a small server that answers by script: at given times, in odd pieces,
// and wrongly where it is told to.
#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/read_until.hpp>
#include <boost/asio/write.hpp>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <sstream>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "cli_fixture.h"

namespace hadal {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using Json = nlohmann::json;
using std::chrono_literals::operator""ms;

std::string chunk(const std::string& bytes) {
  char size[20];
  std::snprintf(size, sizeof size, "%zx\r\n", bytes.size());
  return size + bytes + "\r\n";
}

std::string event(const Json& json) { return "data: " + json.dump() + "\n\n"; }

Json delta(const Json& content) {
  return {{"choices", {{{"index", 0}, {"delta", content}, {"finish_reason", nullptr}}}}};
}

/// What came in and how to answer it.
class Exchange {
 public:
  Exchange(tcp::socket& socket, std::string to, Json content, int64_t number)
      : target(std::move(to)), body(std::move(content)), index(number), socket_(socket) {}

  std::string target;
  Json body;
  int64_t index;  ///< of the request, as they came

  void send(const std::string& bytes) {
    boost::system::error_code error;
    asio::write(socket_, asio::buffer(bytes), error);
    gone_ |= error.failed();
  }
  void status(const std::string& line, const Json& json) {
    const std::string text = json.dump();
    send("HTTP/1.1 " + line + "\r\nContent-Type: application/json\r\nContent-Length: " +
         std::to_string(text.size()) + "\r\n\r\n" + text);
  }
  void begin_stream() {
    send(
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    send(chunk(": hello\n\n" + event(delta({{"role", "assistant"}, {"content", ""}}))));
  }
  void end_stream(int64_t tokens, const char* finish = "stop") {
    send(chunk(event({{"choices", {{{"delta", Json::object()}, {"finish_reason", finish}}}}})));
    send(chunk(event({{"choices", Json::array()},
                      {"usage",
                       {{"prompt_tokens", 10},
                        {"completion_tokens", tokens},
                        {"prompt_tokens_details", {{"cached_tokens", 4}}}}}})));
    send(chunk("data: [DONE]\n\n") + "0\r\n\r\n");
  }
  /// The whole of a good answer: `pieces` tokens, `gap` apart, the first one after `first`.
  void answer(const std::string& word,
              int pieces,
              std::chrono::milliseconds first = 0ms,
              std::chrono::milliseconds gap = 0ms) {
    begin_stream();
    for (int i = 0; i < pieces && !gone_; ++i) {
      std::this_thread::sleep_for(i == 0 ? first : gap);
      const Json text = {{"content", word + std::to_string(i)}};
      send(chunk(event(target.ends_with("/chat/completions")
                           ? delta(text)
                           : Json{{"choices", {{{"text", text["content"]}}}}})));
    }
    end_stream(pieces);
  }
  bool gone() const { return gone_; }

 private:
  tcp::socket& socket_;
  bool gone_ = false;
};

/// A thread a connection; keeps connections as HTTP/1.1 does until `script` returns false.
class ScriptedServer {
 public:
  using Script = std::function<bool(Exchange&)>;

  explicit ScriptedServer(Script script) : script_(std::move(script)) {
    accepting_ = std::thread([this] {
      while (true) {
        auto socket = std::make_shared<tcp::socket>(io_);
        boost::system::error_code error;
        error = acceptor_.accept(*socket, error);
        if (error || closing_) return;
        ++connections;
        const std::lock_guard lock(mutex_);
        threads_.emplace_back([this, socket] { serve(*socket); });
      }
    });
  }
  ~ScriptedServer() {
    closing_ = true;
    boost::system::error_code error;
    // Wakes accept().
    error = tcp::socket(io_).connect(acceptor_.local_endpoint(), error);
    accepting_.join();
    for (std::thread& thread : threads_) thread.join();
  }

  std::string url() const {
    return "http://127.0.0.1:" + std::to_string(acceptor_.local_endpoint().port());
  }

  std::atomic<int64_t> connections{0}, requests{0};

 private:
  void serve(tcp::socket& socket) {
    socket.set_option(tcp::no_delay(true));
    std::string buffer;
    while (true) {
      boost::system::error_code error;
      const size_t header =
          asio::read_until(socket, asio::dynamic_buffer(buffer), "\r\n\r\n", error);
      if (error) return;
      const std::string head = buffer.substr(0, header);
      buffer.erase(0, header);
      size_t length = 0;
      if (const size_t at = head.find("Content-Length: "); at != std::string::npos)
        length = std::stoul(head.substr(at + 16));
      while (buffer.size() < length) {
        char bytes[4096];
        const size_t n = socket.read_some(asio::buffer(bytes), error);
        if (error) return;
        buffer.append(bytes, n);
      }
      const size_t space = head.find(' ');
      Exchange exchange(socket, head.substr(space + 1, head.find(' ', space + 1) - space - 1),
                        Json::parse(buffer.substr(0, length), nullptr, false), requests++);
      buffer.erase(0, length);
      if (!script_(exchange) || exchange.gone()) return;
    }
  }

  Script script_;
  asio::io_context io_;
  tcp::acceptor acceptor_{io_, tcp::endpoint(asio::ip::address_v4::loopback(), 0)};
  std::atomic<bool> closing_{false};
  std::mutex mutex_;
  std::vector<std::thread> threads_;
  std::thread accepting_;
};

class BenchServeCli : public CliFixture {
 protected:
  CliResult bench(const ScriptedServer& server, const std::string& more) const {
    return run("bench serve --url " + server.url() + " --model scripted " + more);
  }
};

int64_t errors_of(const Json& report, const std::string& kind) {
  for (const Json& error : report["errors"])
    if (error["kind"] == kind) return error["count"];
  return 0;
}

TEST_F(BenchServeCli, MeasuresWhatTheScriptDoes) {
  ScriptedServer server([](Exchange& exchange) {
    EXPECT_EQ(exchange.target, "/v1/chat/completions");
    EXPECT_EQ(exchange.body["max_tokens"], 7);
    EXPECT_EQ(exchange.body["model"], "scripted");
    EXPECT_EQ(exchange.body["stream"], true);
    EXPECT_EQ(exchange.body["messages"].back()["role"], "user");
    exchange.answer("w", 5, 60ms, 20ms);
    return true;
  });
  const std::string svg = folder_ / "latency.svg", json = folder_ / "report.json";
  const CliResult result = bench(server,
                                 "--rate 20 --arrivals fixed --requests 10 --output 7 "
                                 "--prompt 5:9 --svg " +
                                     svg + " --json " + json);
  EXPECT_EQ(result.code, 0) << result.error;
  EXPECT_NE(result.out.find("10 requests"), std::string::npos) << result.out;
  EXPECT_NE(result.out.find("to the first token"), std::string::npos) << result.out;

  const Json report = Json::parse(slurp(json));
  EXPECT_EQ(report["answered"], 10);
  EXPECT_EQ(report["failed"], 0);
  EXPECT_EQ(report["answer_tokens"], 50);
  EXPECT_EQ(report["prompt_tokens"], 100);
  EXPECT_EQ(report["cached_tokens"], 40);
  EXPECT_EQ(report["gap_ms"]["count"], 40);
  EXPECT_EQ(report["first_token_ms"]["count"], 10);
  // From below exactly; from above as far as a busy machine lets us say.
  EXPECT_GE(report["first_token_ms"]["p50"], 59.0);
  EXPECT_LT(report["first_token_ms"]["p50"], 1000.0);
  EXPECT_GE(report["gap_ms"]["p90"], 15.0);
  EXPECT_GE(report["end_to_end_ms"]["p50"], 139.0);
  for (const char* row : {"first_token_ms", "gap_ms", "end_to_end_ms"}) {
    EXPECT_LE(report[row]["p50"], report[row]["p90"]) << row;
    EXPECT_LE(report[row]["p90"], report[row]["p99"]) << row;
    EXPECT_LE(report[row]["p99"], report[row]["max"]) << row;
  }
  EXPECT_GE(report["seconds"], 0.45 + 0.14);  // the last one is planned at 0.45 s
  EXPECT_NE(slurp(svg).find("Time between tokens"), std::string::npos);
  // The first six overlap (140 ms at 20 a second); the rest finds connections to reuse.
  EXPECT_LT(server.connections, 10);
}

TEST_F(BenchServeCli, SendsAtThePlannedTimeWhateverTheServerDoes) {
  std::atomic<int> open{0}, most{0};
  ScriptedServer server([&](Exchange& exchange) {
    const int now = ++open;
    int seen = most;
    while (now > seen && !most.compare_exchange_weak(seen, now)) {
    }
    exchange.answer("w", 2, 500ms);
    --open;
    return true;
  });
  // Twenty requests planned within 0.1 s; none is answered before 0.5 s.
  const CliResult result = bench(server, "--rate 200 --requests 20 --json -");
  ASSERT_EQ(result.code, 0) << result.error;
  EXPECT_EQ(most, 20);
  EXPECT_EQ(Json::parse(result.out)["first_token_ms"]["count"], 20);
  EXPECT_GE(Json::parse(result.out)["first_token_ms"]["p50"], 499.0);
}

TEST_F(BenchServeCli, ReadsStreamsInAnyPieces) {
  ScriptedServer server([](Exchange& exchange) {
    exchange.begin_stream();
    // Every byte in a chunk of its own; a character of two bytes falls apart, too.
    const std::string bytes =
        event(delta({{"reasoning_content", "h\u00e4"}})) + event(delta({{"content", "a\u00f6"}})) +
        event(delta({{"tool_calls",
                      {{{"index", 0},
                        {"id", std::to_string(exchange.index)},
                        {"function", {{"name", "f"}, {"arguments", "{}"}}}}}}}));
    for (const char byte : bytes) exchange.send(chunk({byte}));
    exchange.end_stream(3, "tool_calls");
    return true;
  });
  const std::string record = folder_ / "answers.jsonl";
  const CliResult result =
      bench(server, "--concurrency 2 --requests 6 --distinct 2 --json - --record " + record);
  ASSERT_EQ(result.code, 0) << result.error;
  const Json report = Json::parse(result.out);
  EXPECT_EQ(report["answered"], 6);
  EXPECT_EQ(report["gap_ms"]["count"], 12);
  EXPECT_EQ(report["wrong"], 0);
  EXPECT_GE(report["compared"], 3);
  std::istringstream lines(slurp(record));
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    const Json answer = Json::parse(line);
    EXPECT_EQ(answer["reasoning"], "h\u00e4");
    EXPECT_EQ(answer["text"], "a\u00f6");
    EXPECT_EQ(answer["tool_calls"], "f {}");
    EXPECT_EQ(answer["finish_reason"], "tool_calls");
  }
  EXPECT_EQ(count, 2);
}

TEST_F(BenchServeCli, CountsErrorsByKind) {
  ScriptedServer server([](Exchange& exchange) {
    switch (exchange.index) {
      case 0:
        exchange.status("429 Too Many Requests",
                        {{"error", {{"type", "overloaded"}, {"message", "later"}}}});
        return true;
      case 1:
        exchange.status("500 Oops", Json::array());
        return true;
      case 2:
        exchange.begin_stream();
        exchange.send(chunk(event({{"error", {{"type", "server_error"}, {"message", "broke"}}}})));
        return false;
      case 3:  // dies in the middle of a chunk
        exchange.begin_stream();
        exchange.send("100\r\ndata: ");
        return false;
      case 4:
        exchange.begin_stream();
        exchange.send(chunk("data: {no json\n\n") + "0\r\n\r\n");
        return true;
      case 5:
        exchange.begin_stream();
        exchange.send(chunk(event(delta({{"content", "x"}}))) + "0\r\n\r\n");
        return true;
      case 6:
        exchange.send("SMTP ready\r\n\r\n");
        return false;
      case 7:
        std::this_thread::sleep_for(400ms);
        return false;
      default:
        exchange.answer("w", 3);
        return true;
    }
  });
  const CliResult result = bench(server, "--concurrency 1 --requests 10 --timeout 0.3 --json -");
  EXPECT_EQ(result.code, 0) << result.error;
  const Json report = Json::parse(result.out);
  EXPECT_EQ(report["answered"], 2) << result.out;
  EXPECT_EQ(report["failed"], 8);
  for (const char* kind : {"HTTP 429 overloaded", "HTTP 500", "API server_error", "connection lost",
                           "bad stream", "incomplete stream", "bad HTTP", "timeout"})
    EXPECT_EQ(errors_of(report, kind), 1) << kind << "\n" << result.out;
}

TEST_F(BenchServeCli, AKeptConnectionThatTheServerClosedIsNoError) {
  ScriptedServer server([](Exchange& exchange) {
    exchange.answer("w", 2);
    return false;  // although it said nothing of it
  });
  const CliResult result = bench(server, "--concurrency 1 --requests 5 --json -");
  EXPECT_EQ(result.code, 0) << result.error;
  EXPECT_EQ(Json::parse(result.out)["answered"], 5) << result.out;
  EXPECT_EQ(server.connections, 5);
}

TEST_F(BenchServeCli, FindsWrongAnswers) {
  std::atomic<bool> spoilt{false};
  ScriptedServer server([&](Exchange& exchange) {
    const std::string word = exchange.body["prompt"].get<std::string>().substr(0, 20) + "|";
    const bool wrong = spoilt && exchange.body["seed"] == 3;
    exchange.answer(wrong ? "?" : word, 12, 0ms, 1ms);
    return true;
  });
  const std::string record = folder_ / "answers.jsonl";
  const std::string load = "--endpoint completions --distinct 8 --seed 5 --prompt 20 ";
  EXPECT_EQ(bench(server, load + "--concurrency 1 --requests 8 --record " + record).code, 0);

  // In another order, with clients that leave early: what they got is compared, too.
  const std::string again = load + "--concurrency 4 --requests 40 --cancel 0.5 --json - --expect ";
  CliResult result = bench(server, again + record);
  EXPECT_EQ(result.code, 0) << result.out << result.error;
  Json report = Json::parse(result.out);
  EXPECT_EQ(report["compared"], 40);
  EXPECT_GT(report["cancelled"], 8);
  EXPECT_EQ(report["answered"].get<int64_t>() + report["cancelled"].get<int64_t>(), 40);
  EXPECT_LT(report["answer_tokens"], 480);

  spoilt = true;
  result = bench(server, again + record);
  EXPECT_EQ(result.code, 1);
  report = Json::parse(result.out);
  EXPECT_GE(report["wrong"], 1);
  EXPECT_LT(report["wrong"], 20);
  EXPECT_NE(result.error.find("wrong answer to request"), std::string::npos) << result.error;

  // Another seed asks what the file does not know.
  result = bench(server,
                 "--endpoint completions --seed 6 --concurrency 4 --requests 3 --expect " + record);
  EXPECT_EQ(result.code, 1);
  EXPECT_NE(result.out.find("3 without a recorded one"), std::string::npos) << result.out;
}

TEST_F(BenchServeCli, SharesPrefixesAndDrawsTheSameRequestsAgain) {
  std::mutex mutex;
  std::vector<std::string> bodies;
  ScriptedServer server([&](Exchange& exchange) {
    {
      const std::lock_guard lock(mutex);
      bodies.push_back(exchange.body.dump());
    }
    exchange.answer("w", 1);
    return true;
  });
  const std::string load =
      "--concurrency 1 --requests 20 --shared-prefix 40 --shared-share 0.5 --prompt lognormal:30:1 "
      "--extra '{\"top_p\": 0.5}' ";
  ASSERT_EQ(bench(server, load + "--seed 1").code, 0);
  const std::vector<std::string> first = std::exchange(bodies, {});
  ASSERT_EQ(bench(server, load + "--seed 1").code, 0);
  EXPECT_EQ(std::exchange(bodies, {}), first);
  ASSERT_EQ(bench(server, load + "--seed 2").code, 0);
  EXPECT_NE(bodies, first);

  int shared = 0;
  std::string prefix;
  for (const std::string& text : first) {
    const Json body = Json::parse(text);
    EXPECT_EQ(body["top_p"], 0.5);
    if (body["messages"].size() == 1) continue;
    ++shared;
    const std::string system = body["messages"][0]["content"];
    if (prefix.empty()) prefix = system;
    EXPECT_EQ(system, prefix);
    EXPECT_EQ(std::count(system.begin(), system.end(), ' '), 39);
  }
  EXPECT_GT(shared, 3);
  EXPECT_LT(shared, 17);
}

TEST_F(BenchServeCli, SlowReadersAreLeftOutOfTheTimes) {
  ScriptedServer server([](Exchange& exchange) {
    exchange.answer("w", 4);
    return true;
  });
  const CliResult result =
      bench(server, "--concurrency 6 --requests 6 --slow-readers 0.5 --json - --seed 3");
  ASSERT_EQ(result.code, 0) << result.error;
  const Json report = Json::parse(result.out);
  const int64_t slow = report["slow_readers"];
  EXPECT_GT(slow, 0);
  EXPECT_LT(slow, 6);
  EXPECT_EQ(report["answered"], 6);
  EXPECT_EQ(report["answer_tokens"], 24);
  EXPECT_EQ(report["first_token_ms"]["count"], 6 - slow);
  EXPECT_GT(report["seconds"], 0.3);
}

TEST_F(BenchServeCli, AsksForTheModel) {
  std::string asked;
  ScriptedServer server([&](Exchange& exchange) {
    if (exchange.target == "/v1/models") {
      exchange.status("200 OK", {{"data", {{{"id", "first"}}, {{"id", "second"}}}}});
    } else {
      asked = exchange.body["model"];
      exchange.answer("w", 1);
    }
    return true;
  });
  EXPECT_EQ(run("bench serve --concurrency 1 --requests 1 --url " + server.url() + "/v1/").code, 0);
  EXPECT_EQ(asked, "first");
}

TEST_F(BenchServeCli, RefusesBadUsage) {
  const std::string url = "bench serve --url http://127.0.0.1:9 --model m ";
  expect_refused(run("bench serve --url localhost:8000 --rate 1"), "no http:// or https://");
  expect_refused(run("bench serve --url http://no..where --rate 1"), "no..where");
  expect_refused(run(url), "one of --rate and --concurrency");
  expect_refused(run(url + "--rate 1 --cancel 2"), "--cancel");
  expect_refused(run(url + "--rate 1 --extra '[1]'"), "--extra");
  expect_refused(run(url + "--rate 1 --expect " + write("bad", "{\"request\": 1}\n")), "line 1");
  expect_refused(run("bench"), "expected read, gemm, step, model or serve");
}

TEST_F(BenchServeCli, ARunWithoutAnyAnswerIsNoSuccess) {
  std::string url;
  {
    const ScriptedServer gone([](Exchange&) { return false; });
    url = gone.url();
  }
  const CliResult result = run("bench serve --model m --concurrency 1 --requests 3 --url " + url);
  EXPECT_EQ(result.code, 1);
  EXPECT_NE(result.out.find("3  connect: Connection refused"), std::string::npos) << result.out;
  expect_refused(run("bench serve --concurrency 1 --url " + url), "Connection refused");
}

}  // namespace
}  // namespace hadal
