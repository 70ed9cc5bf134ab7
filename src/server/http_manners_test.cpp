// Small manners of HTTP that clients, proxies and browsers rely on.
#include <chrono>
#include <string>
#include <thread>
#include <zlib.h>

#include <gtest/gtest.h>
#include <zstd.h>

#include "base/check.h"
#include "server/content_coding.h"
#include "server/http_text.h"
#include "server/sealed_text.h"
#include "testing/scripted_service.h"

namespace hadal::server {
namespace {

using testing::events_of;
using testing::LoopbackClient;
using testing::parsed;
using testing::Reply;
using testing::ScriptedService;
using testing::value_at;

constexpr const char* kMessages = "/v1/messages";
constexpr const char* kChat = "/v1/chat/completions";
const std::string kMessage =
    R"({"max_tokens": 50000, "messages": [{"role": "user", "content": "hi"}])";
const std::string kTurn =
    R"({"messages": [{"role": "user", "content": "hi"}], "reasoning_effort": "none")";

std::string gzip(const std::string& text) {
  z_stream stream{};
  EXPECT_EQ(deflateInit2(&stream, 9, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
  std::string out(text.size() + 1000, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(out.size() - stream.avail_out);
  deflateEnd(&stream);
  return out;
}

TEST(HttpManners, TargetsAreTakenApart) {
  const auto parts = [](std::string_view target) {
    const HttpTarget split = split_target(target);
    return split.authority + "|" + split.path + "|" + split.query;
  };
  EXPECT_EQ(parts("/v1/models?a=b?c"), "|/v1/models|a=b?c");
  EXPECT_EQ(parts("http://Host:80/x?y"), "Host:80|/x|y");
  EXPECT_EQ(parts("HTTPS://[::1]"), "[::1]|/|");
  EXPECT_EQ(parts("http://h?q"), "h|/|q");
  EXPECT_EQ(parts("/http://x"), "|/http://x|");
  EXPECT_EQ(parts("*"), "|*|");
  EXPECT_EQ(percent_decoded("org%2Fmodel%2f%e2%82%AC%"), "org/model/\xe2\x82\xac%");
  EXPECT_EQ(percent_decoded("%zz%4"), "%zz%4");
  EXPECT_EQ(http_date(784111777), "Sun, 06 Nov 1994 08:49:37 GMT");
  EXPECT_EQ(http_date(1709210096), "Thu, 29 Feb 2024 12:34:56 GMT");
  for (const char* host :
       {"localhost", "LocalHost:1", "127.0.0.1:80", "127.9.8.7", "[::1]:5", "a.localhost",
        "localhost.", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]:1"})
    EXPECT_TRUE(is_loopback_name(host_of(host))) << host;
  for (const char* host : {"", "x", "127.0.0.1.evil.org", "127.0.0", "127.0.0.256", "1.2.3.4",
                           "localhost.evil.org", "evil-localhost", "[::2]", "0127.0.0.1"})
    EXPECT_FALSE(is_loopback_name(host_of(host))) << host;
}

TEST(HttpManners, EveryAnswerIsDatedAndNamesItsRequest) {
  ScriptedService service;
  for (const Reply& reply :
       {service.get("/health"), service.get("/nowhere"), service.post(kChat, "{"),
        service.post(kChat, kTurn + R"(, "stream": true})")}) {
    EXPECT_TRUE(reply.headers.at("date").ends_with(" GMT")) << reply.headers.at("date");
    EXPECT_TRUE(reply.headers.at("x-request-id").starts_with("req_"));
  }
  const std::string mine = "X-Request-Id: my-id.7\r\n";
  EXPECT_EQ(service.get("/health", mine).headers.at("x-request-id"), "my-id.7");
  for (const char* more : {"}", R"(, "stream": true})"}) {
    EXPECT_EQ(service.post(kChat, kTurn + more, mine).headers.at("x-request-id"), "my-id.7");
    EXPECT_EQ(service.post(kMessages, kMessage + more, mine).headers.at("request-id"), "my-id.7");
    EXPECT_EQ(
        service.post(kMessages, kMessage + more, "request-id: yours\r\n").headers.at("request-id"),
        "yours");
  }
  // What does not fit into a header or a log is not repeated.
  for (const std::string& bad :
       {std::string(200, 'a'), std::string("a b"), std::string("\x80\xff")})
    EXPECT_TRUE(service.get("/health", "x-request-id: " + bad + "\r\n")
                    .headers.at("x-request-id")
                    .starts_with("req_"));
  // An error's body and header agree.
  for (const auto& [path, body] : std::vector<std::pair<std::string, std::string>>{
           {kMessages, "{"}, {kMessages, "{}"}, {"/v1/messages/count_tokens", "{}"}}) {
    const Reply reply = service.post(path, body);
    EXPECT_EQ(reply.status, 400);
    EXPECT_EQ(value_at(parsed(reply), "request_id"), reply.headers.at("request-id"));
  }
  service.answer = "!broken";
  const Reply whole = service.post(kMessages, kMessage + "}");
  EXPECT_EQ(value_at(parsed(whole), "request_id"), whole.headers.at("request-id"));
  const Reply stream = service.post(kMessages, kMessage + R"(, "stream": true})");
  EXPECT_EQ(value_at(events_of(stream).back().data, "request_id"), stream.headers.at("request-id"));
}

TEST(HttpManners, HostsAndTargets) {
  ScriptedService service;
  const auto status = [&](const std::string& bytes) { return service.raw(bytes).status; };
  EXPECT_EQ(status("GET /health HTTP/1.1\r\n\r\n"), 400);
  EXPECT_EQ(status("GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n"), 400);
  EXPECT_EQ(status("GET /health HTTP/1.0\r\n\r\n"), 200);
  EXPECT_EQ(status("GET http://localhost:1/health?x=1 HTTP/1.1\r\nHost: other\r\n\r\n"), 200);
  EXPECT_EQ(status("GET http://other/health HTTP/1.1\r\nHost: localhost\r\n\r\n"), 403);
  EXPECT_EQ(status("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n"), 404);
  const Reply wrong = service.raw("GET /v1/messages HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(wrong.status, 405);
  EXPECT_EQ(wrong.headers.at("allow"), "POST");
  const Reply get = service.raw("PUT /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(get.headers.at("allow"), "GET");
  EXPECT_EQ(value_at(parsed(get), "error.code"), "method_not_allowed");
}

TEST(HttpManners, ForeignPagesAndHostsAreRefusedOnLoopback) {
  ScriptedService service;
  const std::string body = kTurn + "}";
  const auto ask = [&](const std::string& host, const std::string& origin) {
    return service.raw("POST /v1/chat/completions HTTP/1.1\r\nHost: " + host +
                       "\r\nContent-Type: text/plain\r\n" +
                       (origin.empty() ? "" : "Origin: " + origin + "\r\n") +
                       "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body);
  };
  for (const char* host : {"localhost:8000", "127.0.0.1", "[::1]:80"}) {
    EXPECT_EQ(ask(host, "").status, 200) << host;
    EXPECT_EQ(ask(host, std::string("http://") + host).status, 200) << host;
  }
  EXPECT_EQ(ask("localhost", "http://127.0.0.1:3000").status, 200);  // another port of this machine
  EXPECT_EQ(ask("localhost", "http://127.0.0.1:3000").headers.count("access-control-allow-origin"),
            0u);
  const size_t before = service.engine.requests().size();
  for (const auto& [host, origin] : std::vector<std::pair<std::string, std::string>>{
           {"evil.example", ""},
           {"evil.example", "http://evil.example"},
           {"localhost", "http://evil.example"},
           {"localhost", "null"},
           {"localhost", "https://localhost.evil.example"}}) {
    const Reply reply = ask(host, origin);
    EXPECT_EQ(reply.status, 403) << host << " " << origin;
    EXPECT_EQ(value_at(parsed(reply), "error.type"), "permission_error");
    EXPECT_EQ(reply.headers.count("access-control-allow-origin"), 0u);
  }
  EXPECT_EQ(service.engine.requests().size(), before);
}

TEST(HttpManners, PagesMayCallWhereTheOperatorSaysSo) {
  ServerOptions options;
  options.cors = {"https://chat.example", "http://localhost:3000"};
  options.allowed_hosts = {"box.internal"};
  options.api_keys = {"secret"};
  ScriptedService service(options);
  const auto preflight = [&](const std::string& origin) {
    return service.raw("OPTIONS /v1/messages HTTP/1.1\r\nHost: localhost\r\nOrigin: " + origin +
                       "\r\nAccess-Control-Request-Method: POST\r\n"
                       "Access-Control-Request-Headers: x-api-key, content-type\r\n\r\n");
  };
  const Reply allowed = preflight("https://chat.example");  // a browser sends no key yet
  EXPECT_EQ(allowed.status, 200);
  EXPECT_EQ(allowed.headers.at("access-control-allow-origin"), "https://chat.example");
  EXPECT_EQ(allowed.headers.at("access-control-allow-headers"), "x-api-key, content-type");
  EXPECT_NE(allowed.headers.at("access-control-allow-methods").find("POST"), std::string::npos);
  EXPECT_EQ(allowed.headers.at("vary"), "Origin");
  const Reply foreign = preflight("https://evil.example");
  EXPECT_EQ(foreign.status, 403);
  EXPECT_EQ(foreign.headers.count("access-control-allow-origin"), 0u);
  const std::string key = "x-api-key: secret\r\n", origin = "Origin: https://chat.example\r\n";
  for (const char* more : {"}", R"(, "stream": true})", R"(, "temperature": 9})"}) {
    const Reply reply = service.post(kMessages, kMessage + more, key + origin);
    EXPECT_EQ(reply.headers.at("access-control-allow-origin"), "https://chat.example") << more;
  }
  // Also refusals are for the page to read.
  EXPECT_EQ(service.post(kMessages, "{}", origin).status, 401);
  EXPECT_EQ(service.post(kMessages, "{}", origin).headers.at("access-control-allow-origin"),
            "https://chat.example");
  EXPECT_EQ(service.get("/health").headers.at("vary"), "Origin");
  EXPECT_EQ(service.raw("GET /health HTTP/1.1\r\nHost: Box.internal:9\r\n\r\n").status, 200);
  EXPECT_EQ(service.raw("GET /health HTTP/1.1\r\nHost: chat.example\r\n\r\n").status, 200);

  options.cors = {"*"};
  ScriptedService open(options);
  EXPECT_EQ(open.get("/health", "Origin: null\r\n").headers.at("access-control-allow-origin"),
            "null");
  EXPECT_EQ(open.raw("GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n").status, 403);
  // Without the flag nothing is said to browsers.
  ScriptedService closed;
  const Reply asked = closed.raw(
      "OPTIONS /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost:1\r\n"
      "Access-Control-Request-Method: GET\r\n\r\n");
  EXPECT_EQ(asked.status, 405);
  EXPECT_EQ(asked.headers.count("access-control-allow-origin"), 0u);
  EXPECT_EQ(asked.headers.count("vary"), 0u);
  for (const char* bad : {"chat.example", "https://", "https://a/b", ""}) {
    options.cors = {bad};
    EXPECT_THROW(ScriptedService{options}, InputError) << bad;
  }
}

TEST(HttpManners, CompressedBodies) {
  ScriptedService service;
  const std::string body = kTurn + "}";
  const auto send = [&](const std::string& coding, const std::string& bytes) {
    return service.post(kChat, bytes, "Content-Encoding: " + coding + "\r\n");
  };
  EXPECT_EQ(send("gzip", gzip(body)).status, 200);
  EXPECT_EQ(send("GZIP", gzip(body.substr(0, 20)) + gzip(body.substr(20))).status, 200);
  EXPECT_EQ(send("gzip, gzip", gzip(gzip(body))).status, 200);
  EXPECT_EQ(send("identity", body).status, 200);
  std::string packed(ZSTD_compressBound(body.size()), '\0');
  packed.resize(ZSTD_compress(packed.data(), packed.size(), body.data(), body.size(), 3));
  EXPECT_EQ(send("zstd", packed).status, 200);
  for (const std::string coding : {"gzip", "zstd"}) {
    const std::string good = coding == "gzip" ? gzip(body) : packed;
    for (size_t cut = 0; cut < good.size(); ++cut)
      EXPECT_THROW(decoded_body(coding, good.substr(0, cut), 1 << 20), RequestError) << cut;
    EXPECT_EQ(send(coding, good.substr(0, good.size() - 1)).status, 400);
    EXPECT_EQ(send(coding, body).status, 400);
  }
  const Reply unknown = send("br", body);
  EXPECT_EQ(unknown.status, 415);
  EXPECT_NE(unknown.body.find("'br'"), std::string::npos);
  // A small body that grows beyond the limit is stopped there.
  const std::string zeros(1 << 20, ' ');
  try {
    decoded_body("gzip", gzip(zeros), zeros.size() - 1);
    FAIL();
  } catch (const RequestError& error) {
    EXPECT_EQ(error.status(), 413);
  }
  EXPECT_EQ(decoded_body("gzip", gzip(zeros), zeros.size()), zeros);
}

TEST(HttpManners, KeysInEveryFormThatClientsSend) {
  ServerOptions options;
  options.api_keys = {"secret"};
  ScriptedService service(options);
  for (const char* good : {"Authorization: Bearer secret", "authorization: bearer secret",
                           "Authorization: BEARER  secret", "x-api-key: secret", "api-key: secret",
                           "x-api-key: old\r\nAuthorization: Bearer secret"})
    EXPECT_EQ(service.get("/v1/models", std::string(good) + "\r\n").status, 200) << good;
  for (const char* bad : {"Authorization: Basic secret", "Authorization: secret",
                          "Authorization: Bearer", "x-api-key: Secret"})
    EXPECT_EQ(service.get("/v1/models", std::string(bad) + "\r\n").status, 401) << bad;
}

TEST(HttpManners, ModelNamesAndAliases) {
  ServerOptions options;
  options.model_aliases = {"org/model", "claude-sonnet"};
  ScriptedService service(options);
  for (const char* path : {"/v1/models/scripted", "/v1/models/org%2Fmodel", "/v1/models/org/model",
                           "/v1/models/claude-sonnet"})
    EXPECT_EQ(service.get(path).status, 200) << path;
  EXPECT_EQ(value_at(parsed(service.get("/v1/models/org%2fmodel")), "id"), "org/model");
  EXPECT_EQ(service.get("/v1/models/org%252Fmodel").status, 404);
  const Json list = parsed(service.get("/v1/models"));
  EXPECT_EQ(list.find("data")->items().size(), 3u);
  EXPECT_EQ(value_at(list, "data.0.id"), "scripted");
  EXPECT_EQ(value_at(list, "data.2.type"), "model");
  EXPECT_EQ(value_at(list, "data.2.root"), "scripted");
  EXPECT_EQ(value_at(list, "has_more"), "false");
  EXPECT_EQ(value_at(list, "last_id"), "claude-sonnet");
  const std::string named = kMessage + R"(, "model": "claude-sonnet"})";
  EXPECT_EQ(value_at(parsed(service.post(kMessages, named)), "model"), "claude-sonnet");
  const std::string other = kMessage + R"(, "model": "gpt"})";
  EXPECT_EQ(service.post(kMessages, other).status, 404);
  options.any_model = true;
  ScriptedService any(options);
  EXPECT_EQ(value_at(parsed(any.post(kMessages, other)), "model"), "gpt");
  EXPECT_EQ(value_at(parsed(any.get("/v1/models/gpt")), "id"), "gpt");
}

TEST(HttpManners, WhatOthersAskServers) {
  ScriptedService service;
  EXPECT_EQ(service.get("/ping").status, 200);
  EXPECT_EQ(service.post("/ping", "").status, 200);
  EXPECT_FALSE(value_at(parsed(service.get("/version")), "version").empty());
  const Json info = parsed(service.get("/tokenizer_info"));
  EXPECT_NE(value_at(info, "eos_token").find("end"), std::string::npos);
  EXPECT_EQ(value_at(info, "vocab_size"), std::to_string(service.tokenizer.vocab_size()));
  for (const char* path : {"/v1/embeddings", "/v1/images/generations", "/v1/audio/speech"}) {
    const Reply reply = service.post(path, R"({"input": "x"})");
    EXPECT_EQ(reply.status, 404) << path;
    EXPECT_EQ(value_at(parsed(reply), "error.code"), "unsupported_endpoint");
  }
  EXPECT_NE(service.post("/v1/embeddings", "{}").body.find("embeddings"), std::string::npos);
}

TEST(HttpManners, AKeyThatComesTwiceIsRefused) {
  ScriptedService service;
  const std::string many =
      R"(, "metadata": {"a1":1,"a2":1,"a3":1,"a4":1,"a5":1,"a6":1,"a7":1,"a8":1,
      "a9":1,"a10":1,"a11":1,"a12":1,"a13":1,"a14":1,"a15":1,"a16":1,"a17":1,"a18":1,)";
  EXPECT_EQ(service.post(kChat, kTurn + many + R"("a19": 1}})").status, 200);
  for (const std::string& body : {kTurn + R"(, "stream": false, "stream": true})",
                                  kTurn + R"(, "metadata": {"a": 1, "a": 1}})",
                                  kTurn + many + R"("a3": 1}})", kTurn + many + R"("a17": 1}})"}) {
    const Reply reply = service.post(kChat, body);
    EXPECT_EQ(reply.status, 400) << body;
    EXPECT_NE(reply.body.find("comes again"), std::string::npos) << reply.body;
  }
}

TEST(HttpManners, AStreamBeginsWithItsFirstToken) {
  ServerOptions options;
  options.ping_interval = std::chrono::milliseconds(10);
  ScriptedService service(options);
  struct Case {
    const char* path;
    std::string body, first;
    bool at_once;
  };
  const Case cases[] = {
      {kChat, kTurn + R"(, "stream": true})", "\"role\": \"assistant\"", false},
      {kMessages, kMessage + R"(, "stream": true})", "message_start", false},
      {"/v1/responses", R"({"input": "hi", "stream": true})", "response.created", true}};
  for (const Case& c : cases) {
    service.engine.hold(true);
    LoopbackClient client = service.client();
    client.send(testing::post_bytes(c.path, c.body));
    std::string seen = client.receive_until("ping");
    seen += client.receive_until("ping");
    seen += client.receive_until("ping");
    EXPECT_TRUE(seen.starts_with("HTTP/1.1 200 ")) << seen;
    EXPECT_EQ(seen.find(c.first) != std::string::npos, c.at_once) << c.path << seen;
    service.engine.hold(false);
    if (!c.at_once) {
      EXPECT_NE(client.receive_until(c.first).find(c.first), std::string::npos) << c.path;
    }
  }
}

TEST(HttpManners, DrainingEndsAStreamWithAnErrorEvent) {
  const std::pair<const char*, std::string> streams[] = {
      {kChat, kTurn + R"(, "stream": true})"},
      {"/v1/completions", R"({"prompt": "hi", "max_tokens": 100000, "stream": true})"},
      {"/v1/responses", R"({"input": "hi", "stream": true})"},
      {kMessages, kMessage + R"(, "stream": true})"}};
  for (const bool begun : {false, true}) {
    ServerOptions options;
    options.drain_timeout = std::chrono::milliseconds(50);
    testing::ScriptedEngineOptions slow;
    slow.step = std::chrono::milliseconds(begun ? 1 : 0);
    slow.max_context = 1 << 20;
    ScriptedService service(options, slow);
    service.answer = std::string(500'000, 'a');
    service.engine.hold(!begun);
    std::vector<LoopbackClient> clients;
    for (const auto& [path, body] : streams)
      clients.emplace_back(service.server->port()).send(testing::post_bytes(path, body));
    LoopbackClient whole = service.client();
    whole.send(testing::post_bytes(kMessages, R"({"max_tokens": 100000, "messages": [{"role":
        "user", "content": "hi"}]})"));
    ASSERT_TRUE(service.engine.wait_running(5));
    std::thread stopping([&] { service.server->stop(); });
    for (size_t i = 0; i < clients.size(); ++i) {
      const Reply reply = clients[i].receive();
      EXPECT_EQ(reply.status, 200);
      EXPECT_NE(reply.body.find("the server is stopping"), std::string::npos)
          << streams[i].first
          << reply.body.substr(reply.body.size() > 500 ? reply.body.size() - 500 : 0);
    }
    const Reply refused = whole.receive();
    EXPECT_EQ(refused.status, 503);
    EXPECT_EQ(value_at(parsed(refused), "error.type"), "overloaded_error");
    stopping.join();
    service.engine.hold(false);
  }
}

TEST(HttpManners, SealedTextComesBackWhole) {
  for (const std::string& text :
       {std::string(), std::string("a"), std::string("ab"), std::string("abc"),
        std::string("\xe2\x82\xac\0x", 5), std::string(5000, 'z')}) {
    const std::string sealed = seal_text(text);
    EXPECT_EQ(unseal_text(sealed), text);
    for (size_t cut = 0; cut < sealed.size(); cut += 1 + sealed.size() / 50)
      EXPECT_FALSE(unseal_text(sealed.substr(0, cut))) << cut;
  }
  for (const char* foreign : {"", "hadal", "hadal1.", "hadal1.====", "hadal1.!!!!", "EqQBCkYIAhgC"})
    EXPECT_FALSE(unseal_text(foreign)) << foreign;
}

}  // namespace
}  // namespace hadal::server
