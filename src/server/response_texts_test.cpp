// Responses in the engine's store on disk: as in a folder of their own (responses_test.cpp).
#include <gtest/gtest.h>

#include "server/response_store.h"
#include "testing/api_harness.h"
#include "testing/disk_store_fixture.h"

namespace hadal::server {
namespace {

class ResponseTextsTest : public testing::ApiHarness {
 protected:
  static constexpr const char* kPath = "/v1/responses";
  void start() {
    api_.reset();
    store_.reset();  // one process has the folder
    store_ = std::make_unique<engine_core::DiskStore>(
        testing::disk_options(folder_.path(), engine_core::WindowPolicy::kPeriodic));
    options_.texts = store_.get();
  }
  Json respond(const std::string& input, const std::string& more = "") {
    const Json reply =
        post(kPath, concat(R"({"input": )", input, more.empty() ? "" : ", ", more, "}"));
    EXPECT_EQ(status_, 200) << reply.dump();
    return reply;
  }
  testing::TemporaryFolder folder_;
  std::unique_ptr<engine_core::DiskStore> store_;
};

TEST_F(ResponseTextsTest, AreGoneOnFromAlsoAfterARestart) {
  start();
  answers_ = {"hm</think>First."};
  const Json first = respond(R"([{"role": "user", "content": "one"}])");
  EXPECT_EQ(at(first, "store"), "true");
  const std::string id = first.find("id")->text();
  const std::string go_on = concat(R"("previous_response_id": ")", id, "\"");
  respond("\"two\"", go_on);  // at once
  EXPECT_NE(prompt_of_last().find("one<｜Assistant｜></think>First."), std::string::npos);
  start();
  const Json third = respond("\"two\"", concat(R"("store": false, )", go_on));
  EXPECT_NE(prompt_of_last().find("one<｜Assistant｜></think>First."), std::string::npos);
  const std::string path = concat(kPath, "/", id);
  EXPECT_EQ(call("GET", path, "").body, first.dump());
  EXPECT_EQ(at(Json::parse(call("GET", path + "/input_items", "").body, "list"), "data"),
            R"([{"role": "user", "content": "one"}])");
  EXPECT_EQ(call("GET", concat(kPath, "/", third.find("id")->text()), "").status, 404);
  EXPECT_EQ(call("DELETE", path, "").status, 200);
  EXPECT_EQ(call("DELETE", path, "").status, 404);
  start();
  EXPECT_EQ(call("GET", path, "").status, 404);
  post(kPath, concat(R"({"input": "x", )", go_on, "}"));
  EXPECT_EQ(status_, 404);
}

TEST_F(ResponseTextsTest, NothingButAResponseIsOne) {
  start();
  store_->put_text("resp_broken", R"({"items": [)");
  store_->put_text("resp_other", R"({"items": 5})");
  store_->put_text("secret", R"({"items": [], "response": {}})");
  for (const char* id : {"resp_broken", "resp_other", "secret", "resp_../x"})
    EXPECT_EQ(call("GET", concat(kPath, "/", id), "").status, 404) << id;
}

// A folder that was asked for comes first.
TEST_F(ResponseTextsTest, AFolderComesFirst) {
  start();
  testing::TemporaryFolder other;
  options_.response_folder = other.path();
  const std::string id = respond("\"one\"").find("id")->text();
  EXPECT_FALSE(store_->get_text(id));
  EXPECT_EQ(call("GET", concat(kPath, "/", id), "").status, 200);
}

}  // namespace
}  // namespace hadal::server
