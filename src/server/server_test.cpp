// The server on real sockets: what the connection promises, whatever the API.
#include "server/server.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <sys/socket.h>
#include <thread>

#include <gtest/gtest.h>

#include "testing/loopback_client.h"
#include "testing/scripted_engine.h"
#include "testing/tiny_tokenizer.h"

namespace hadal::server {
namespace {

using std::chrono::milliseconds;
using testing::LoopbackClient;
using testing::Reply;
using testing::ScriptedEngine;
using testing::ScriptedEngineOptions;

constexpr const char* kChat =
    R"({"messages": [{"role": "user", "content": "hi"}], "thinking": false, "stream": true})";
constexpr const char* kPlain =
    R"({"messages": [{"role": "user", "content": "hi"}], "thinking": false})";

/// A server with a scripted engine; the script answers `text`.
struct Fixture {
  explicit Fixture(std::string text = "Hello!",
                   ServerOptions options = {},
                   ScriptedEngineOptions engine_options = {})
      : tokenizer(text::Tokenizer::from_json(testing::byte_tokenizer_json(), "tiny")),
        engine(
            tokenizer,
            [text = std::move(text)](const engine_core::Request&, int64_t) { return text; },
            engine_options) {
    options.port = 0;
    server.emplace(engine, tokenizer, options);
    server->start();
  }
  LoopbackClient client(int receive_bytes = 0) {
    return LoopbackClient(server->port(), receive_bytes);
  }

  text::Tokenizer tokenizer;
  ScriptedEngine engine;
  std::optional<Server> server;
};

template <typename Condition>
bool eventually(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (std::chrono::steady_clock::now() < end) {
    if (condition()) return true;
    std::this_thread::sleep_for(milliseconds(2));
  }
  return condition();
}

TEST(Server, KeepsConnectionsAliveAndAnswersPipelinedRequestsInOrder) {
  Fixture f;
  LoopbackClient client = f.client();
  EXPECT_EQ(client.get("/health").body, R"({"status": "ok"})");
  EXPECT_EQ(client.post("/v1/chat/completions", kPlain).status, 200);
  client.send(testing::post_bytes("/v1/chat/completions", kChat) +
              "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" +
              testing::post_bytes("/v1/chat/completions", kPlain));
  const Reply first = client.receive();
  EXPECT_EQ(first.events().back(), "[DONE]");
  EXPECT_EQ(client.receive().body, R"({"status": "ok"})");
  EXPECT_NE(client.receive().body.find("Hello!"), std::string::npos);
  EXPECT_EQ(f.server->stats().accepted, 1);
}

/// An engine whose grammars take until they are let go.
class SlowGrammars final : public engine_core::Engine {
 public:
  explicit SlowGrammars(engine_core::Engine& inner) : inner_(inner) {}
  const engine_core::EngineInfo& info() const override { return inner_.info(); }
  engine_core::Submitted submit(engine_core::Request request,
                                std::shared_ptr<engine_core::Sink> sink,
                                uint64_t* id) override {
    if (request.grammar.kind != engine_core::Grammar::Kind::kNone) {
      ++begun;
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return free_; });
    }
    return inner_.submit(std::move(request), std::move(sink), id);
  }
  void cancel(uint64_t id) override { inner_.cancel(id); }
  engine_core::EngineStats stats() const override { return inner_.stats(); }
  void let_go() {
    const std::lock_guard lock(mutex_);
    free_ = true;
    changed_.notify_all();
  }
  std::atomic<int> begun{0};

 private:
  engine_core::Engine& inner_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool free_ = false;
};

TEST(Server, SlowGrammarsHoldUpNobodyElse) {
  const auto tokenizer = text::Tokenizer::from_json(testing::byte_tokenizer_json(), "tiny");
  ScriptedEngine inner(tokenizer, [](const engine_core::Request&, int64_t) { return "{}"; });
  SlowGrammars engine(inner);
  ServerOptions options;
  options.port = 0;
  options.grammar_threads = 2;
  Server server(engine, tokenizer, options);
  server.start();
  const std::string constrained =
      testing::post_bytes("/v1/chat/completions",
                          R"({"messages": [{"role": "user", "content": "hi"}], "thinking": false,
          "response_format": {"type": "json_object"}})");
  std::vector<LoopbackClient> waiting;
  const auto send = [&](int count) {
    for (; count > 0; --count) waiting.emplace_back(server.port()).send(constrained);
  };
  send(2);
  ASSERT_TRUE(eventually([&] { return engine.begun == 2; }));
  send(3);
  LoopbackClient other(server.port());
  EXPECT_EQ(other.post("/v1/chat/completions", kPlain).status, 200);
  ASSERT_TRUE(eventually([&] { return server.stats().active == 5; }));
  // Of those behind the two, who leaves is not submitted.
  waiting.pop_back();
  waiting.pop_back();
  ASSERT_TRUE(eventually([&] { return server.stats().left == 2; }));
  engine.let_go();
  for (LoopbackClient& client : waiting) EXPECT_EQ(client.receive().status, 200);
  server.stop();
  EXPECT_EQ(engine.begun, 3);
}

TEST(Server, ClosesWhereTheClientAsksTo) {
  Fixture f;
  LoopbackClient client = f.client();
  const Reply reply = client.get("/health", "Connection: close\r\n");
  EXPECT_EQ(reply.headers.at("connection"), "close");
  EXPECT_TRUE(client.at_end());
  LoopbackClient old = f.client();
  old.send("POST /v1/chat/completions HTTP/1.0\r\nContent-Length: " +
           std::to_string(std::string_view(kChat).size()) + "\r\n\r\n" + kChat);
  const Reply stream = old.receive();  // no chunks in HTTP/1.0: the end is the connection's
  EXPECT_EQ(stream.status, 200);
  EXPECT_EQ(stream.events().back(), "[DONE]");
  LoopbackClient head = f.client();
  head.send("HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
  const std::string bytes = head.receive_until("\n\n");
  EXPECT_TRUE(bytes.ends_with("\r\n\r\n")) << bytes;
}

TEST(Server, StreamsBeginBeforeTheFirstTokenAndStayAlive) {
  ServerOptions options;
  options.ping_interval = milliseconds(20);
  Fixture f("Hello!", options);
  f.engine.hold(true);
  const std::string message =
      R"({"max_tokens": 9, "stream": true, "messages": [{"role": "user", "content": "hi"}]})";
  const std::string response =
      R"({"input": "hi", "reasoning": {"effort": "none"}, "stream": true})";
  struct Case {
    const char* path;
    std::string body, first, ping, last;
  };
  const Case cases[] = {
      {"/v1/chat/completions", kChat, ": ping\n\n", ": ping\n\n", "data: [DONE]"},
      {"/v1/completions", R"({"prompt": "hi", "stream": true})", "", ": ping\n\n", "data: [DONE]"},
      {"/v1/responses", response, "response.in_progress", ": ping\n\n", "response.completed"},
      {"/v1/messages", message, "event: ping", "event: ping\ndata: {\"type\": \"ping\"}\n\n",
       "message_stop"},
  };
  for (const Case& c : cases) {
    LoopbackClient client = f.client();
    client.send(testing::post_bytes(c.path, c.body));
    std::string seen;
    const auto sees = [&](const std::string& text, size_t times = 1) {
      return eventually([&] {
        seen += client.receive_until("\n");
        size_t found = 0;
        for (size_t pos = 0; (pos = seen.find(text, pos)) != std::string::npos; ++pos) ++found;
        return found >= times;
      });
    };
    EXPECT_TRUE(sees("\r\n\r\n"));
    EXPECT_TRUE(seen.starts_with("HTTP/1.1 200 ")) << seen;
    EXPECT_NE(seen.find("text/event-stream"), std::string::npos);
    EXPECT_TRUE(sees(c.first)) << seen;
    EXPECT_TRUE(sees(c.ping, 3)) << seen;
    EXPECT_EQ(seen.find(c.last), std::string::npos);
    f.engine.hold(false);
    EXPECT_TRUE(sees(c.last)) << seen;
    f.engine.hold(true);
  }
  f.engine.hold(false);
  EXPECT_TRUE(eventually([&] { return f.server->stats().active == 0; }));
}

TEST(Server, APingFindsThatTheClientHasLeft) {
  ServerOptions options;
  options.ping_interval = milliseconds(10);
  Fixture f("Hello!", options);
  f.engine.hold(true);
  {
    LoopbackClient client = f.client();
    client.send(testing::post_bytes("/v1/chat/completions", kChat));
    EXPECT_NE(client.receive_until(": ping").find(": ping"), std::string::npos);
  }
  EXPECT_TRUE(f.engine.wait_cancelled(1));
  f.engine.hold(false);
  EXPECT_TRUE(eventually([&] { return f.server->stats().active == 0; }));
  std::this_thread::sleep_for(milliseconds(30));  // a timer that was forgotten would fire now
}

TEST(Server, SaysContinueWhereAsked) {
  Fixture f;
  LoopbackClient client = f.client();
  client.send(
      "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: "
      "100-continue\r\nContent-Length: " +
      std::to_string(std::string_view(kPlain).size()) + "\r\n\r\n");
  EXPECT_EQ(client.receive_until("\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
  client.send(kPlain);
  EXPECT_EQ(client.receive().status, 200);
}

TEST(Server, RefusesWhatIsNoRequest) {
  struct Case {
    const char* bytes;
    int status;
  };
  const std::string long_header =
      "GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + std::string(20'000, 'a') + "\r\n\r\n";
  const Case cases[] = {
      {"\r\n\r\nGARBAGE\r\n\r\n", 400},
      {"GET /health\r\n\r\n", 400},
      {"GET /health HTTP/9.9\r\n\r\n", 400},
      {"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400},
      {"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400},
      {"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413},
      {"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: "
       "chunked\r\n\r\n0\r\n\r\n",
       400},
      {"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", 400},
      {"GET /health HTTP/1.1\r\nBad Header\r\n\r\n", 400},
      {long_header.c_str(), 431},
      {"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n", 404},
      {"GET /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 405},
      {"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 405},
      {"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 405},
      {"BREW /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 405},
  };
  Fixture f;
  for (const Case& c : cases) {
    LoopbackClient client = f.client();
    client.send(c.bytes);
    const Reply reply = client.receive();
    EXPECT_EQ(reply.status, c.status) << c.bytes;
    EXPECT_NE(reply.body.find("\"error\""), std::string::npos) << c.bytes;
  }
  EXPECT_EQ(f.client().post("/v1/chat/completions", kPlain).status, 200);
}

TEST(Server, RefusesLargeBodiesAlsoInChunks) {
  ServerOptions options;
  options.max_body_bytes = 1000;
  Fixture f("x", options);
  const std::string large(2000, ' ');
  EXPECT_EQ(f.client().post("/v1/messages", large).status, 413);
  LoopbackClient chunks = f.client();
  chunks.send(
      "POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
  for (int i = 0; i < 4; ++i) chunks.send("190\r\n" + std::string(400, ' ') + "\r\n");
  const Reply reply = chunks.receive();
  EXPECT_EQ(reply.status, 413);
  EXPECT_NE(reply.body.find("request_too_large"), std::string::npos) << reply.body;
}

TEST(Server, DropsThoseWhoSendTooSlowly) {
  ServerOptions options;
  options.idle_timeout = milliseconds(100);
  options.body_timeout = milliseconds(100);
  Fixture f("x", options);
  LoopbackClient silent = f.client(), header = f.client(), body = f.client(), idle = f.client();
  header.send("GET /hea");
  body.send("POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{");
  EXPECT_EQ(idle.get("/health").status, 200);
  EXPECT_EQ(idle.post("/v1/chat/completions", kPlain).status, 200);
  for (LoopbackClient* client : {&silent, &header, &body, &idle}) EXPECT_TRUE(client->at_end());
  EXPECT_TRUE(eventually([&] { return f.server->stats().connections == 0; }));
}

TEST(Server, CancelsWhenTheClientLeaves) {
  ScriptedEngineOptions slow;
  slow.step = milliseconds(1);
  slow.max_context = 1 << 20;
  Fixture f(std::string(100'000, 'a'), {}, slow);
  LoopbackClient stream = f.client(), whole = f.client(), waiting = f.client();
  stream.send(testing::post_bytes("/v1/chat/completions", kChat));
  EXPECT_NE(stream.receive_until("\"a\"").find("\"a\""), std::string::npos);
  whole.send(testing::post_bytes("/v1/chat/completions", kPlain));
  ASSERT_TRUE(f.engine.wait_running(2));
  stream.close();
  whole.close();
  EXPECT_TRUE(f.engine.wait_cancelled(2));
  f.engine.hold(true);  // before its first token, too
  waiting.send(testing::post_bytes(
      "/v1/messages", R"({"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]})"));
  ASSERT_TRUE(f.engine.wait_running(1));
  waiting.close();
  EXPECT_TRUE(f.engine.wait_cancelled(3));
  f.engine.hold(false);
  EXPECT_TRUE(eventually([&] { return f.server->stats().active == 0; }));
  EXPECT_EQ(f.server->stats().left, 3);
}

TEST(Server, DropsThoseWhoDoNotRead) {
  ServerOptions options;
  options.max_output_bytes = 64 << 10;
  options.socket_send_bytes = 8 << 10;
  ScriptedEngineOptions engine;
  engine.max_context = 1 << 20;
  engine.step = std::chrono::microseconds(50);  // not done before the server has written so much
  Fixture f(std::string(50'000, 'a'), options, engine);
  LoopbackClient lazy = f.client(4096);
  lazy.send(testing::post_bytes("/v1/chat/completions", kChat));
  LoopbackClient other = f.client();
  EXPECT_TRUE(f.engine.wait_cancelled(1));
  EXPECT_EQ(f.server->stats().slow_dropped, 1);
  EXPECT_EQ(other.get("/health").status, 200);
}

TEST(Server, WriteTimeoutDropsAStalledClient) {
  ServerOptions options;
  options.write_timeout = milliseconds(100);
  options.max_output_bytes = 1 << 30;
  options.socket_send_bytes = 8 << 10;
  ScriptedEngineOptions engine;
  engine.max_context = 1 << 20;
  Fixture f(std::string(3000, 'a'), options, engine);
  LoopbackClient lazy = f.client(4096);
  lazy.send(testing::post_bytes("/v1/chat/completions", kChat));
  EXPECT_TRUE(eventually([&] { return f.server->stats().slow_dropped == 1; }));
}

TEST(Server, FullQueueIsAnswered429) {
  ScriptedEngineOptions engine;
  engine.max_requests = 1;
  ServerOptions options;
  options.retry_after = std::chrono::seconds(7);
  Fixture f("x", options, engine);
  f.engine.hold(true);
  LoopbackClient first = f.client();
  first.send(testing::post_bytes("/v1/chat/completions", kPlain));
  ASSERT_TRUE(f.engine.wait_running(1));
  const Reply refused = f.client().post("/v1/chat/completions", kChat);
  EXPECT_EQ(refused.status, 429);
  EXPECT_EQ(refused.headers.at("retry-after"), "7");
  EXPECT_NE(refused.body.find("rate_limit_error"), std::string::npos);
  // Two prompts, one place: the accepted half is cancelled.
  f.engine.hold(false);
  EXPECT_EQ(first.receive().status, 200);
  ASSERT_TRUE(eventually([&] { return f.engine.stats().running == 0; }));
  f.engine.hold(true);
  EXPECT_EQ(f.client().post("/v1/completions", R"({"prompt": ["a", "b"]})").status, 429);
  EXPECT_TRUE(f.engine.wait_cancelled(1));
}

TEST(Server, KeysAndTheirConcurrency) {
  ServerOptions options;
  options.api_keys = {"alpha", "beta"};
  options.max_concurrent_per_key = 1;
  Fixture f("x", options);
  EXPECT_EQ(f.client().get("/health").status, 200);
  const Reply none = f.client().get("/v1/models");
  EXPECT_EQ(none.status, 401);
  EXPECT_NE(none.body.find("authentication_error"), std::string::npos);
  for (const char* wrong :
       {"Authorization: Bearer alph\r\n", "Authorization: Bearer \r\n", "Authorization: alpha\r\n",
        "x-api-key: Alpha\r\n", "x-api-key:\r\n", "Authorization: Basic alpha\r\n"})
    EXPECT_EQ(f.client().post("/v1/chat/completions", kPlain, wrong).status, 401) << wrong;
  EXPECT_EQ(f.client().get("/v1/models", "x-api-key: beta\r\n").status, 200);
  f.engine.hold(true);
  LoopbackClient first = f.client();
  const std::string alpha = "Authorization: Bearer alpha\r\n";
  first.send(testing::post_bytes("/v1/chat/completions", kPlain, alpha));
  ASSERT_TRUE(f.engine.wait_running(1));
  const Reply second = f.client().post("/v1/chat/completions", kPlain, alpha);
  EXPECT_EQ(second.status, 429);
  EXPECT_EQ(second.headers.count("retry-after"), 1u);
  LoopbackClient beta = f.client();
  beta.send(testing::post_bytes("/v1/chat/completions", kPlain, "x-api-key: beta\r\n"));
  ASSERT_TRUE(f.engine.wait_running(2));
  EXPECT_NE(f.engine.requests()[0].client, f.engine.requests()[1].client);
  f.engine.hold(false);
  EXPECT_EQ(first.receive().status, 200);
  EXPECT_EQ(beta.receive().status, 200);
  EXPECT_EQ(first.post("/v1/chat/completions", kPlain, alpha).status, 200);
  // Refused requests give their place back.
  EXPECT_EQ(first.post("/v1/chat/completions", "{}", alpha).status, 400);
  EXPECT_EQ(first.post("/v1/chat/completions", kPlain, alpha).status, 200);
}

TEST(Server, DrainLetsOpenAnswersEnd) {
  ScriptedEngineOptions slow;
  slow.step = milliseconds(2);
  Fixture f(std::string(50, 'a'), {}, slow);
  LoopbackClient stream = f.client(), idle = f.client();
  EXPECT_EQ(idle.get("/health").status, 200);
  stream.send(testing::post_bytes("/v1/chat/completions", kChat));
  ASSERT_TRUE(f.engine.wait_running(1));
  const uint16_t port = f.server->port();
  std::thread stopping([&] { f.server->stop(); });
  const Reply reply = stream.receive();
  EXPECT_EQ(reply.status, 200);
  ASSERT_FALSE(reply.events().empty());
  EXPECT_EQ(reply.events().back(), "[DONE]");
  stopping.join();
  EXPECT_TRUE(idle.at_end());
  EXPECT_TRUE(stream.at_end());
  EXPECT_THROW(LoopbackClient{port}, Error);
}

TEST(Server, DrainEndsAtItsTimeout) {
  ServerOptions options;
  options.drain_timeout = milliseconds(50);
  Fixture f("x", options);
  f.engine.hold(true);
  LoopbackClient client = f.client();
  client.send(testing::post_bytes("/v1/chat/completions", kChat));
  ASSERT_TRUE(f.engine.wait_running(1));
  f.server->stop();
  EXPECT_TRUE(client.at_end());
  EXPECT_TRUE(f.engine.wait_cancelled(1));
  f.server.reset();
  f.engine.hold(false);  // the engine's late words reach nobody
  EXPECT_TRUE(eventually([&] { return f.engine.stats().running == 0; }));
}

TEST(Server, OneFailingRequestTakesNoOtherDown) {
  Fixture f("!the model is broken");
  LoopbackClient healthy = f.client();
  for (int i = 0; i < 3; ++i) {
    const Reply reply = f.client().post("/v1/chat/completions", kPlain);
    EXPECT_EQ(reply.status, 500);
    EXPECT_NE(reply.body.find("the model is broken"), std::string::npos);
    const Reply stream = f.client().post("/v1/chat/completions", kChat);
    EXPECT_EQ(stream.status, 200);
    EXPECT_NE(stream.body.find("the model is broken"), std::string::npos);
    EXPECT_EQ(stream.events().back(), "[DONE]");
    EXPECT_EQ(healthy.get("/health").status, 200);
  }
}

/// Answers a request with itself.
class Mirror final : public HttpHandler {
 public:
  void handle(HttpRequest request, std::shared_ptr<Responder> responder) override {
    if (request.path != "/stream") {
      HttpResponse response;
      response.body = request.method + " " + request.path + " " + request.body;
      for (const auto& [name, value] : request.headers)
        if (name != "host") response.body += " " + name + "=" + value;
      return responder->send(std::move(response));
    }
    responder->begin_stream({});
    responder->write(request.body);
    responder->write("more");
    responder->end_stream();
  }
  HttpResponse error(int status, std::string_view message, std::string_view) override {
    HttpResponse response;
    response.status = status;
    response.body = message;
    return response;
  }
};

TEST(HttpSession, AnswersTheSameHoweverTheBytesAreCut) {
  const ServerOptions options;
  Mirror mirror;
  HttpSession session(options, mirror);
  const std::string bytes =
      "GET /a HTTP/1.1\r\nHost: localhost\r\n\r\n"
      "POST /b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: "
      "chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
      "POST /stream HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\nbody"
      "HEAD /c HTTP/1.1\r\nHost: x\r\n\r\nPOST /d HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi"
      "GET /never HTTP/1.1\r\nHost: x\r\n\r\n";
  const auto run = [&](const std::vector<std::string_view>& pieces) { return session.run(pieces); };
  const std::string whole = run({bytes});
  size_t from = 0;
  for (const char* part : {"GET /a ", "POST /b abcde", "100 Continue", "4\r\nbody\r\n4\r\nmore",
                           "HTTP/1.1 200 OK", "Connection: close", "POST /d hi"}) {
    const size_t found = whole.find(part, from);
    ASSERT_NE(found, std::string::npos) << part << "\n" << whole;
    from = found + 1;
  }
  EXPECT_EQ(whole.find("/never"), std::string::npos);
  for (size_t cut = 0; cut <= bytes.size(); ++cut) {
    const std::string_view view = bytes;
    EXPECT_EQ(run({view.substr(0, cut), view.substr(cut)}), whole) << cut;
  }
  std::vector<std::string_view> every;
  for (size_t i = 0; i < bytes.size(); ++i) every.push_back(std::string_view(bytes).substr(i, 1));
  EXPECT_EQ(run(every), whole);
  EXPECT_NE(run({"GET /a HTTP/1.1\r\nHost: x\r\n\r\nnonsense\r\n\r\n"}).find("HTTP/1.1 400"),
            std::string::npos);
  EXPECT_EQ(run({"GET /a HT"}), "");
  // The end of an empty body, byte by byte.
  EXPECT_TRUE(
      run({"POST /e HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", "\r", "\n"})
          .ends_with("POST /e  transfer-encoding=chunked"));
}

// What follows a chunked body's last chunk would pass the checks that its header has passed.
TEST(HttpSession, TrailersAreNoHeaders) {
  const ServerOptions options;
  Mirror mirror;
  HttpSession session(options, mirror);
  const std::string head = "POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n";
  const std::string body =
      "\r\n3\r\nabc\r\n0\r\nHost: localhost\r\nAuthorization: Bearer x\r\nX: y\r\n\r\n";
  HttpRequest request;
  for (const bool host : {false, true}) {
    const std::string bytes = head + (host ? "Host: h\r\n" : "") + body;
    const std::string_view whole[] = {bytes};
    const std::string answer = session.run(whole);
    EXPECT_EQ(parse_http_request(bytes, options, request), host ? 0 : 400);
    if (host) {
      EXPECT_TRUE(answer.ends_with("POST /a abc transfer-encoding=chunked")) << answer;
    } else {
      EXPECT_TRUE(answer.starts_with("HTTP/1.1 400 ")) << answer;
    }
  }
  EXPECT_EQ(request.headers, (std::vector<std::pair<std::string, std::string>>{
                                 {"transfer-encoding", "chunked"}, {"host", "h"}}));
}

TEST(Server, HandlersThatThrowAreAnswered500) {
  class Thrower final : public HttpHandler {
   public:
    void handle(HttpRequest request, std::shared_ptr<Responder> responder) override {
      if (request.path == "/throw") throw std::runtime_error("secret");
      if (request.path == "/post")
        return responder->post([] { throw std::runtime_error("secret"); });
      if (request.path == "/middle") {
        responder->begin_stream({});
        responder->write("begun");
        return responder->post([] { throw std::runtime_error("secret"); });
      }
      responder->send({200, "text/plain", "fine", {}});
      responder->send({200, "text/plain", "twice", {}});  // without effect
      responder->write("late");
    }
    HttpResponse error(int status, std::string_view message, std::string_view) override {
      return {status, "text/plain", std::string(message), {}};
    }
  };
  ServerOptions options;
  options.port = 0;
  Thrower handler;
  HttpServer server(options, handler);
  server.start();
  for (const char* path : {"/throw", "/post"}) {
    LoopbackClient client(server.port());
    const Reply reply = client.get(path);
    EXPECT_EQ(reply.status, 500) << path;
    EXPECT_EQ(reply.body, "internal error");
    EXPECT_EQ(client.get("/fine").body, "fine");
    EXPECT_EQ(client.get("/fine").body, "fine");
  }
  LoopbackClient cut(server.port());
  EXPECT_EQ(cut.get("/middle").status, 0);  // a stream cannot turn into an error: it is cut
  EXPECT_EQ(LoopbackClient(server.port()).get("/fine").status, 200);
}

TEST(Server, RefusesConnectionsOverTheLimit) {
  ServerOptions options;
  options.max_connections = 2;
  Fixture f("x", options);
  LoopbackClient a = f.client(), b = f.client();
  EXPECT_EQ(a.get("/health").status, 200);
  EXPECT_EQ(b.get("/health").status, 200);
  EXPECT_TRUE(f.client().at_end());
  a.close();
  EXPECT_TRUE(eventually([&] { return f.server->stats().connections == 1; }));
  EXPECT_EQ(f.client().get("/health").status, 200);
}

TEST(Server, FiveHundredStreamsAtATime) {
  ScriptedEngineOptions engine;
  Fixture f(std::string(20, 'a') + "\xc3\xa4 end", {}, engine);
  f.engine.hold(true);
  std::vector<LoopbackClient> clients;
  for (int i = 0; i < 500; ++i) {
    clients.push_back(f.client());
    ASSERT_TRUE(clients.back().send(testing::post_bytes("/v1/chat/completions", kChat)));
  }
  ASSERT_TRUE(f.engine.wait_running(500));
  EXPECT_EQ(f.server->stats().active, 500);
  f.engine.hold(false);
  for (LoopbackClient& client : clients) {
    const Reply reply = client.receive();
    ASSERT_EQ(reply.status, 200);
    std::string text;
    for (const std::string& event : reply.events()) {
      const std::string key = "\"delta\": {\"content\": \"";
      const size_t at = event.find(key);
      if (at != std::string::npos)
        text += event.substr(at + key.size(), event.find('"', at + key.size()) - at - key.size());
    }
    ASSERT_EQ(text, std::string(20, 'a') + "\xc3\xa4 end");
    ASSERT_EQ(reply.events().back(), "[DONE]");
  }
}

// --- TLS ---

/// A self-signed certificate and its key in two files.
struct TestCertificate {
  TestCertificate() {
    EVP_PKEY* pair = EVP_RSA_gen(2048);
    X509* certificate = X509_new();
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
    X509_gmtime_adj(X509_getm_notBefore(certificate), 0);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
    X509_set_pubkey(certificate, pair);
    X509_NAME* name = X509_get_subject_name(certificate);
    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC,
                               reinterpret_cast<const uint8_t*>("localhost"), -1, -1, 0);
    X509_set_issuer_name(certificate, name);
    X509_sign(certificate, pair, EVP_sha256());
    folder = std::filesystem::temp_directory_path() / concat("hadal_tls_", ::getpid());
    std::filesystem::create_directories(folder);
    FILE* file = std::fopen(path("cert.pem").c_str(), "w");
    PEM_write_X509(file, certificate);
    std::fclose(file);
    file = std::fopen(path("key.pem").c_str(), "w");
    PEM_write_PrivateKey(file, pair, nullptr, nullptr, 0, nullptr, nullptr);
    std::fclose(file);
    X509_free(certificate);
    EVP_PKEY_free(pair);
  }
  ~TestCertificate() { std::filesystem::remove_all(folder); }
  std::string path(const char* name) const { return (folder / name).string(); }
  std::filesystem::path folder;
};

TEST(Server, Tls) {
  const TestCertificate certificate;
  ServerOptions options;
  options.tls_certificate = certificate.path("cert.pem");
  options.tls_key = certificate.path("key.pem");
  ScriptedEngineOptions slow;
  slow.step = milliseconds(1);
  slow.max_context = 1 << 20;
  Fixture f(std::string(300, 'a'), options, slow);
  SSL_CTX* context = SSL_CTX_new(TLS_client_method());
  const auto connect = [&](const LoopbackClient& socket) {
    SSL* ssl = SSL_new(context);
    SSL_set_fd(ssl, socket.fd());
    EXPECT_EQ(SSL_connect(ssl), 1);
    return ssl;
  };
  const auto read_until = [](SSL* ssl, std::string_view text) {
    std::string all;
    char bytes[4096];
    while (all.find(text) == std::string::npos) {
      const int count = SSL_read(ssl, bytes, sizeof(bytes));
      if (count <= 0) break;
      all.append(bytes, static_cast<size_t>(count));
    }
    return all;
  };
  const std::string request = testing::post_bytes("/v1/chat/completions", kChat);
  {
    LoopbackClient socket = f.client();
    SSL* ssl = connect(socket);
    for (int i = 0; i < 2; ++i) {  // keep-alive
      SSL_write(ssl, request.data(), static_cast<int>(request.size()));
      const std::string all = read_until(ssl, "0\r\n\r\n");
      EXPECT_TRUE(all.starts_with("HTTP/1.1 200 OK")) << all;
      EXPECT_NE(all.find("[DONE]"), std::string::npos);
    }
    // A client that leaves in the middle.
    SSL_write(ssl, request.data(), static_cast<int>(request.size()));
    read_until(ssl, "\"a\"");
    SSL_free(ssl);
  }
  EXPECT_TRUE(f.engine.wait_cancelled(1));
  LoopbackClient plain = f.client();
  plain.send("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_TRUE(plain.at_end());
  LoopbackClient socket = f.client();
  SSL* ssl = connect(socket);
  f.server->stop();
  EXPECT_EQ(read_until(ssl, "x"), "");
  SSL_free(ssl);
  SSL_CTX_free(context);
}

TEST(Server, BadOptionsAreNamed) {
  const auto message = [](auto change) -> std::string {
    ServerOptions options;
    change(options);
    try {
      Fixture f("x", options);
    } catch (const InputError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(message([](ServerOptions& o) { o.host = "nowhere"; }).find("'nowhere'"),
            std::string::npos);
  EXPECT_NE(message([](ServerOptions& o) { o.tls_certificate = "/none"; }).find("a key"),
            std::string::npos);
  EXPECT_NE(
      message([](ServerOptions& o) { o.tls_certificate = o.tls_key = "/none"; }).find("/none"),
      std::string::npos);
  EXPECT_NE(message([](ServerOptions& o) { o.api_keys = {""}; }).find("empty"), std::string::npos);
}

}  // namespace
}  // namespace hadal::server
