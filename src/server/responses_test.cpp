// /v1/responses as today's agents use it: kinds of tools and items, reasoning that comes back.
#include <filesystem>
#include <fstream>
#include <unistd.h>

#include <gtest/gtest.h>

#include "server/response_store.h"
#include "testing/api_harness.h"
#include "text/tool_calls.h"

namespace hadal::server {
namespace {

class ResponsesTest : public testing::ApiHarness {
 protected:
  static constexpr const char* kPath = "/v1/responses";
  static constexpr const char* kTools = R"("tools": [
    {"type": "function", "name": "f", "parameters": {"type": "object"}},
    {"type": "namespace", "name": "mail", "description": "d", "tools": [
      {"type": "function", "name": "send", "parameters": {"type": "object"}}]},
    {"type": "custom", "name": "patch", "description": "Patches.",
     "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"}},
    {"type": "web_search"}, {"type": "image_generation"}, {"type": "local_shell"}])";

  static std::string calls() {
    const std::vector<text::ToolCall> list = {{"f", R"({"a": 1})"},
                                              {"mail.send", R"({"to": "x"})"},
                                              {"patch", R"({"input": "*** \"Begin\"\n"})"}};
    return "so</think>I call.\n\n" + text::write_tool_calls(list);
  }
  Json respond(const std::string& input, const std::string& more = "") {
    const Json reply =
        post(kPath, R"({"input": )" + input + (more.empty() ? "" : ", " + more) + "}");
    EXPECT_EQ(status_, 200) << reply.dump();
    return reply;
  }
};

TEST_F(ResponsesTest, ToolsOfEveryKind) {
  answers_ = {calls()};
  const Json reply = respond("\"hi\"", kTools);
  EXPECT_EQ(at(reply, "output.2.type"), "\"function_call\"");
  EXPECT_EQ(at(reply, "output.2.name"), "\"f\"");
  EXPECT_EQ(at(reply, "output.3.name"), "\"send\"");
  EXPECT_EQ(at(reply, "output.3.namespace"), "\"mail\"");
  EXPECT_EQ(at(reply, "output.4.type"), "\"custom_tool_call\"");
  EXPECT_EQ(at(reply, "output.4.name"), "\"patch\"");
  EXPECT_EQ(at(reply, "output.4.input"), R"("*** \"Begin\"\n")");
  EXPECT_EQ(at(reply, "output.4.arguments"), "nothing");
  EXPECT_EQ(reply.find("notes")->items().size(), 3u);
  EXPECT_NE(prompt_of_last().find("mail.send"), std::string::npos);
  EXPECT_NE(prompt_of_last().find("lark grammar:\\nstart: X"), std::string::npos);
  EXPECT_EQ(prompt_of_last().find("web_search"), std::string::npos);

  std::string input, names;
  Json last_response;
  for (const Event& event :
       stream(kPath, R"({"input": "hi", "stream": true, )" + std::string(kTools) + "}")) {
    if (event.name == "response.custom_tool_call_input.delta")
      input += event.data.find("delta")->text();
    if (event.name == "response.custom_tool_call_input.done") {
      EXPECT_EQ(event.data.find("input")->text(), input);
    }
    if (event.name == "response.output_item.added")
      names += at(event.data, "item.type") + at(event.data, "item.id").substr(0, 4);
    if (event.name == "response.completed") last_response = *event.data.find("response");
  }
  EXPECT_EQ(input, "*** \"Begin\"\n");
  EXPECT_NE(names.find("\"custom_tool_call\"\"ctc"), std::string::npos) << names;
  for (const char* item : {"output.3.namespace", "output.4.input", "output.1.content.0.text"})
    EXPECT_EQ(at(last_response, item), at(reply, item));
}

TEST_F(ResponsesTest, ChoicesOfTools) {
  const std::string tools = std::string(kTools) + R"(, "reasoning": {"effort": "none"})";
  respond("\"hi\"", tools + R"(, "tool_choice": {"type": "custom", "name": "patch"})");
  EXPECT_TRUE(last().grammar.must_call);
  EXPECT_NE(last().grammar.text.find("patch"), std::string::npos);
  EXPECT_EQ(last().grammar.text.find("mail.send"), std::string::npos);
  respond("\"hi\"",
          tools + R"(, "tool_choice": {"type": "function", "namespace": "mail", "name": "send"})");
  EXPECT_NE(last().grammar.text.find("mail.send"), std::string::npos);
  respond("\"hi\"", tools + R"(, "tool_choice": {"type": "web_search"})");
  EXPECT_FALSE(last().grammar.must_call);
  respond("\"hi\"", tools + R"(, "tool_choice": {"type": "allowed_tools", "mode": "auto",
    "tools": [{"type": "function", "name": "f"}, {"type": "web_search"}]})");
  EXPECT_EQ(last().grammar.text.find("patch"), std::string::npos);
}

TEST_F(ResponsesTest, ItemsOfEveryKind) {
  const Json reply = respond(R"([{"role": "user", "content": [{"type": "input_text", "text": "hi"},
      {"type": "input_image", "image_url": "data:"}, {"type": "input_file", "file_id": "x"}]},
    {"type": "item_reference", "id": "rs_1"},
    {"type": "web_search_call", "id": "ws", "status": "completed"},
    {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "a\"b"},
    {"type": "function_call", "call_id": "c2", "namespace": "mail", "name": "send",
     "arguments": "{}"},
    {"type": "local_shell_call", "call_id": "c3", "action": {"command": ["ls"]}},
    {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
    {"type": "function_call_output", "call_id": "c2", "output": [
      {"type": "input_text", "text": "sent"}, {"type": "input_image", "image_url": "data:"}]},
    {"type": "local_shell_call_output", "call_id": "c3", "output": {"code": 0}}])");
  const std::string prompt = prompt_of_last();
  for (const char* piece :
       {"hi\n\n[Unsupported image]\n\n[Unsupported file]", "a\"b", "mail.send", "local_shell",
        "<tool_result>done</tool_result>", "<tool_result>sent\n\n[Unsupported image]</tool_result>",
        "<tool_result>{\"code\": 0}</tool_result>"}) {
    EXPECT_NE(prompt.find(piece), std::string::npos) << piece << "\n" << prompt;
  }
  EXPECT_EQ(reply.find("notes")->items().size(), 2u);
}

TEST_F(ResponsesTest, SystemItemsAnywhere) {
  respond(R"([{"role": "system", "content": "S"}])", R"("reasoning": {"enabled": false})");
  EXPECT_TRUE(prompt_of_last().ends_with("S<｜User｜><｜Assistant｜></think>")) << prompt_of_last();
  respond(R"([{"role": "user", "content": "hi"}, {"role": "developer", "content": "D"}])",
          R"("reasoning": {"enabled": false})");
  EXPECT_TRUE(prompt_of_last().ends_with("hi\n\nD<｜Assistant｜></think>")) << prompt_of_last();
}

TEST_F(ResponsesTest, ReasoningComesBackSealed) {
  answers_ = {"because ä</think>Yes."};
  const std::string include = R"("include": ["reasoning.encrypted_content"])";
  const Json plain = respond("\"hi\"");
  EXPECT_EQ(at(plain, "output.0.encrypted_content"), "nothing");
  const Json reply = respond("\"hi\"", include);
  const std::string sealed = at(reply, "output.0.encrypted_content");
  ASSERT_GT(sealed.size(), 10u);
  EXPECT_EQ(sealed.find("because"), std::string::npos);
  for (const Event& event : stream(kPath, R"({"input": "hi", "stream": true, )" + include + "}")) {
    if (event.name == "response.output_item.done" && at(event.data, "output_index") == "0") {
      EXPECT_EQ(at(event.data, "item.encrypted_content"), sealed);
    }
  }
  // The client keeps nothing but the seal. Where there are tools, reasoning stays in the prompt.
  const std::string call = R"({"type": "function_call", "call_id": "c", "name": "f",
    "arguments": "{}"}, {"type": "function_call_output", "call_id": "c", "output": "1"}])";
  const std::string tools = R"("tools": [{"type": "function", "name": "f"}])";
  respond(R"([{"role": "user", "content": "hi"}, {"type": "reasoning", "id": "rs", "summary": [],
    "content": null, "encrypted_content": )" +
              sealed + "}, " + call,
          tools);
  EXPECT_NE(prompt_of_last().find("<think>because ä</think>"), std::string::npos)
      << prompt_of_last();
  // What another server sealed says nothing here.
  respond(R"([{"role": "user", "content": "hi"}, {"type": "reasoning", "summary": [],
    "encrypted_content": "gAAAA"}, )" +
              call,
          tools);
  EXPECT_NE(prompt_of_last().find("<think></think>"), std::string::npos) << prompt_of_last();
}

TEST_F(ResponsesTest, LogprobsOfTheOutput) {
  answers_ = {"hm</think>Yes"};
  const std::string fields = R"("include": ["message.output_text.logprobs"], "top_logprobs": 1)";
  const Json reply = respond("\"hi\"", fields);
  EXPECT_EQ(at(reply, "output.1.content.0.logprobs.0.token"), "\"Y\"");
  EXPECT_EQ(at(reply, "output.1.content.0.logprobs.0.top_logprobs.0.logprob"), "-0.5");
  EXPECT_EQ(at(reply, "output.1.content.0.logprobs.3"), "nothing");
  std::string tokens;
  for (const Event& event : stream(kPath, R"({"input": "hi", "stream": true, )" + fields + "}")) {
    if (event.name != "response.output_text.delta") continue;
    for (const Json& entry : event.data.find("logprobs")->items())
      tokens += entry.find("token")->text();
  }
  EXPECT_EQ(tokens, "Yes");
}

TEST_F(ResponsesTest, StoredResponsesAreGoneOnFrom) {
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / concat("hadal_responses_", ::getpid());
  options_.response_folder = folder.string();
  answers_ = {"hm</think>First."};
  const Json first = respond(R"([{"role": "user", "content": "one"}])", R"("instructions": "I")");
  EXPECT_EQ(at(first, "store"), "true");
  const std::string id = first.find("id")->text();
  const std::string go_on = concat(R"("previous_response_id": ")", id, "\"");
  // In a stream, too; instructions are not taken over.
  std::string second;
  for (const Event& event : stream(kPath, R"({"input": "two", "stream": true, )" + go_on + "}")) {
    if (event.name == "response.completed")
      second = event.data.find("response")->find("id")->text();
  }
  EXPECT_TRUE(prompt_of_last().ends_with(
      "<｜User｜>one<｜Assistant｜></"
      "think>First.<｜end▁of▁sentence｜><｜User｜>two<｜Assistant｜><think>"))
      << prompt_of_last();
  // What was kept outlives the server.
  api_.reset();
  const Json third =
      respond("\"three\"", concat(R"("store": false, "previous_response_id": ")", second, "\""));
  EXPECT_NE(prompt_of_last().find("<｜User｜>two<｜Assistant｜></think>First."), std::string::npos);
  EXPECT_EQ(at(third, "previous_response_id"), concat("\"", second, "\""));
  EXPECT_EQ(at(third, "store"), "false");
  const std::string path = concat(kPath, "/", id);
  EXPECT_EQ(call("GET", path, "").body, first.dump());
  EXPECT_EQ(at(Json::parse(call("GET", path + "/input_items", "").body, "list"), "data"),
            R"([{"role": "user", "content": "one"}])");
  EXPECT_EQ(call("POST", path, "{}").status, 405);
  EXPECT_EQ(call("DELETE", path, "").status, 200);
  EXPECT_EQ(call("DELETE", path, "").status, 404);
  EXPECT_EQ(call("GET", path, "").status, 404);
  EXPECT_EQ(call("GET", concat(kPath, "/", third.find("id")->text()), "").status, 404);
  EXPECT_EQ(call("GET", "/v1/responses/../../etc/passwd", "").status, 404);
  const Json missing = post(kPath, R"({"input": "x", )" + go_on + "}");
  EXPECT_EQ(status_, 404);
  EXPECT_EQ(at(missing, "error.code"), "\"previous_response_not_found\"");
  std::filesystem::remove_all(folder);
}

TEST(ResponseFolder, KeepsABudgetAndSurvivesDamage) {
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / concat("hadal_response_store_", ::getpid());
  const Json items = Json::array({js(std::string(300, 'x'))});
  const auto response = [](int number) { return Json::object({{"n", js(int64_t{number})}}); };
  {
    ResponseFolder store(folder.string(), 1100);
    for (int i = 0; i < 3; ++i) store.put(concat("resp_", i), items, response(i));
    EXPECT_TRUE(store.find("resp_0"));
    store.put("resp_3", items, response(3));  // the longest unused goes
    EXPECT_FALSE(store.find("resp_1"));
    EXPECT_TRUE(store.find("resp_0"));
    EXPECT_LE(store.bytes(), 1100);
    store.put("resp_4", Json::array({js(std::string(2000, 'x'))}), response(4));
    EXPECT_FALSE(store.find("resp_4"));
    store.put("resp_../x", items, response(5));
    EXPECT_FALSE(store.find("resp_../x"));
  }
  std::ofstream(folder / "resp_0.json") << "{\"items\": [";
  std::ofstream(folder / "other.txt") << "x";
  ResponseFolder store(folder.string(), 1100);
  EXPECT_FALSE(store.find("resp_0"));
  ASSERT_TRUE(store.find("resp_3"));
  EXPECT_EQ(store.find("resp_3")->response.dump(), response(3).dump());
  // A folder that is gone: what is put is not there, and nobody fails.
  std::filesystem::remove_all(folder);
  store.put("resp_9", items, response(9));
  EXPECT_FALSE(store.find("resp_9"));
  EXPECT_THROW(ResponseFolder("/dev/null/x", 5), InputError);
}

TEST_F(ResponsesTest, RefusesByName) {
  struct Case {
    const char* fields;
    const char* message;
  };
  const std::vector<Case> cases = {
      {R"("previous_response_id": "r")", "previous_response_id"},
      {R"("conversation": "c")", "conversation: not supported"},
      {R"("background": true)", "background"},
      {R"("include": ["made.up"])", "include: 'made.up' is not known"},
      {R"("truncation": "auto")", "truncation"},
      {R"("max_tool_calls": 3)", "max_tool_calls"},
      {R"("prompt": {"id": "p"})", "prompt"},
      {R"("prompt_logprobs": 1)", "prompt_logprobs"},
      {R"("tools": [{"type": "made_up"}])", "tools[0].type"},
      {R"("tools": [{"type": "function", "name": "a"}, {"type": "custom", "name": "a"}])",
       "another tool 'a'"},
      {R"("regex": "a", "text": {"format": {"type": "json_object"}})", "text.format"},
  };
  for (const Case& c : cases) {
    const Json reply = post(kPath, R"({"input": "hi", )" + std::string(c.fields) + "}");
    EXPECT_EQ(status_, 400) << c.fields;
    EXPECT_NE(at(reply, "error.message").find(c.message), std::string::npos) << reply.dump();
  }
  EXPECT_TRUE(engine_.requests().empty());
  respond("\"hi\"", R"("truncation": "disabled", "store": true, "conversation": null,
    "include": ["web_search_call.action.sources"], "prompt_cache_key": "k", "service_tier": "auto",
    "text": {"verbosity": "low"}, "stream_options": {"include_obfuscation": false})");
}

}  // namespace
}  // namespace hadal::server
