// Flags of `hadal serve` about who may ask, and under which names.
#include <netinet/in.h>
#include <string>
#include <sys/socket.h>
#include <unistd.h>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "cli_fixture.h"
#include "serve_process.h"
#include "testing/loopback_client.h"

namespace hadal {
namespace {

using nlohmann::json;
using testing::LoopbackClient;
using testing::Server;

class ServeFlags : public CliFixture {};

bool has_ipv6_loopback() {
  const int socket = ::socket(AF_INET6, SOCK_STREAM, 0);
  sockaddr_in6 address{};
  address.sin6_family = AF_INET6;
  address.sin6_addr = in6addr_loopback;
  const bool works =
      socket >= 0 && ::bind(socket, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  if (socket >= 0) ::close(socket);
  return works;
}

TEST_F(ServeFlags, NamesOriginsAndHosts) {
  Server server({"--name", "first", "--name", "org/second", "--cors", "https://chat.example",
                 "--allow-host", "box.internal"});
  ASSERT_GT(server.port(), 0) << server.log();
  const auto get = [&](const std::string& path, const std::string& headers = "") {
    return LoopbackClient(server.port()).get(path, headers);
  };
  const json models = json::parse(get("/v1/models").body);
  EXPECT_EQ(models["data"][0]["id"], "first");
  EXPECT_EQ(models["data"][1]["id"], "org/second");
  EXPECT_EQ(get("/v1/models/org%2Fsecond").status, 200);
  EXPECT_EQ(get("/v1/models/third").status, 404);
  EXPECT_EQ(get("/", "Origin: https://chat.example\r\n").headers.at("access-control-allow-origin"),
            "https://chat.example");
  EXPECT_EQ(get("/", "Origin: https://evil.example\r\n").status, 403);
  LoopbackClient box(server.port());
  box.send("GET /health HTTP/1.1\r\nHost: box.internal\r\n\r\n");
  EXPECT_EQ(box.receive().status, 200);
  EXPECT_EQ(server.stop(SIGTERM), 0);
}

TEST_F(ServeFlags, AnyModel) {
  Server server({"--any-model"});
  ASSERT_GT(server.port(), 0) << server.log();
  EXPECT_EQ(LoopbackClient(server.port()).get("/v1/models/whatever").status, 200);
}

TEST_F(ServeFlags, AnAddressOfIpv6StandsInBrackets) {
  if (!has_ipv6_loopback()) GTEST_SKIP() << "no IPv6 loopback here";
  Server server({"--host", "::1"});
  EXPECT_TRUE(server.url().starts_with("http://[::1]:")) << server.log();
  EXPECT_EQ(server.stop(SIGTERM), 0);
}

TEST_F(ServeFlags, WhatIsNoOriginIsRefused) {
  const CliResult result = run("serve --port 0 --cors chat.example");
  EXPECT_EQ(result.code, 2);
  EXPECT_NE(result.error.find("--cors"), std::string::npos) << result.error;
  EXPECT_NE(result.error.find("chat.example"), std::string::npos) << result.error;
}

}  // namespace
}  // namespace hadal
