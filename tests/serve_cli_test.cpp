// `hadal serve` as its clients and its operator meet it: the shipped model over a socket.
#include <csignal>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "cli_fixture.h"
#include "serve_process.h"
#include "testing/loopback_client.h"

namespace hadal {
namespace {

using nlohmann::json;
using testing::Server;

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
