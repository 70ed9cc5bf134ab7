// /v1/completions: prompts with their log probabilities, many prompts, tokens as ids.
#include <gtest/gtest.h>

#include "testing/api_harness.h"
#include "text/chat_tokens.h"

namespace hadal::server {
namespace {

class CompletionsTest : public testing::ApiHarness {
 protected:
  static constexpr const char* kPath = "/v1/completions";
  /// A field of a stream's chunks of one choice, joined.
  std::string joined(const std::vector<Event>& events, const std::string& path) {
    std::string all;
    for (const Event& event : events) {
      const std::string value = at(event.data, path);
      if (value == "nothing" || value == "[]" || value == "null") continue;
      const bool is_list = value.front() == '[';
      if (is_list && !all.empty()) all += ", ";
      all += is_list ? value.substr(1, value.size() - 2) : Json::parse(value, "text").text();
    }
    return all;
  }
};

TEST_F(CompletionsTest, EchoGivesThePromptsLogprobs) {
  // ä is two tokens: the second begins inside the character.
  const std::string body = R"({"prompt": "aä𝄞b", "echo": true, "logprobs": 1, "max_tokens": 1)";
  const Json reply = post(kPath, body + "}");
  ASSERT_EQ(status_, 200) << reply.dump();
  EXPECT_EQ(at(reply, "choices.0.text"), "\"aä𝄞bH\"");
  EXPECT_EQ(at(reply, "choices.0.finish_reason"), "\"length\"");
  const std::string logprobs = "choices.0.logprobs";
  EXPECT_EQ(at(reply, logprobs + ".tokens"),
            R"(["<｜begin▁of▁sentence｜>", "a", "bytes:\\xc3", "bytes:\\xa4", )"
            R"("bytes:\\xf0", )"
            R"("bytes:\\x9d", "bytes:\\x84", "bytes:\\x9e", "b", "H"])");
  EXPECT_EQ(at(reply, logprobs + ".token_logprobs"),
            "[null, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -0.5]");
  EXPECT_EQ(at(reply, logprobs + ".text_offset"), "[0, 0, 1, 1, 2, 2, 2, 2, 3, 4]");
  EXPECT_EQ(at(reply, logprobs + ".top_logprobs.0"), "null");
  EXPECT_EQ(at(reply, logprobs + ".top_logprobs.8"), R"({"bytes:\\x9e": -0.25, "b": -8.0})");
  EXPECT_EQ(at(reply, logprobs + ".top_logprobs.9"), R"({"H": -0.5})");
  EXPECT_EQ(last().prompt_logprobs, 1);
  EXPECT_EQ(last().max_tokens, 1);
  const std::vector<Event> events = stream(kPath, body + R"(, "stream": true})");
  EXPECT_EQ(joined(events, "choices.0.text"), "aä𝄞bH");
  for (const char* list : {".tokens", ".token_logprobs", ".top_logprobs", ".text_offset"}) {
    EXPECT_EQ("[" + joined(events, logprobs + list) + "]", at(reply, logprobs + list)) << list;
  }
}

TEST_F(CompletionsTest, NoTokensAtAllForPromptsOfEveryKind) {
  const Json reply =
      post(kPath, R"({"prompt": ["ab", [100, 101, 102], [0, 100]], "echo": true, "logprobs": 0,
                 "max_tokens": 0})");
  ASSERT_EQ(status_, 200) << reply.dump();
  EXPECT_EQ(at(reply, "choices.0.text"), "\"ab\"");
  EXPECT_EQ(at(reply, "choices.0.logprobs.token_logprobs"), "[null, -1.0, -2.0]");
  EXPECT_EQ(at(reply, "choices.0.logprobs.top_logprobs.1"), R"({"a": -1.0})");
  EXPECT_EQ(at(reply, "choices.1.text"), "\"abc\"");
  EXPECT_EQ(at(reply, "choices.1.logprobs.tokens"), R"(["a", "b", "c"])");
  EXPECT_EQ(at(reply, "choices.1.logprobs.text_offset"), "[0, 1, 2]");
  // Ids are echoed as they are: a BOS among them is in the text.
  EXPECT_EQ(at(reply, "choices.2.text"), "\"<｜begin▁of▁sentence｜>a\"");
  EXPECT_EQ(at(reply, "choices.2.logprobs.text_offset"), "[0, 21]");
  EXPECT_EQ(at(reply, "choices.2.finish_reason"), "\"length\"");
  EXPECT_EQ(at(reply, "usage.completion_tokens"), "0");
  EXPECT_EQ(last().max_tokens, 0);
  // As long as the context.
  post(kPath, R"({"prompt": ")" + std::string(4095, 'x') + R"(", "max_tokens": 0})");
  EXPECT_EQ(status_, 200);
  post(kPath, R"({"prompt": ")" + std::string(4096, 'x') + R"(", "max_tokens": 0})");
  EXPECT_EQ(status_, 400);
}

TEST_F(CompletionsTest, AModelThatEndsAtOnceStillHasItsTokenInTheLists) {
  answers_ = {""};
  const std::string body = R"({"prompt": "ab", "echo": true, "logprobs": 1, "max_tokens": 1)";
  const Json reply = post(kPath, body + "}");
  EXPECT_EQ(at(reply, "choices.0.text"), "\"ab\"");
  EXPECT_EQ(at(reply, "choices.0.finish_reason"), "\"stop\"");
  EXPECT_EQ(at(reply, "choices.0.logprobs.token_logprobs"), "[null, -1.0, -2.0, -0.5]");
  EXPECT_EQ(at(reply, "choices.0.logprobs.text_offset"), "[0, 0, 1, 2]");
  const std::vector<Event> events = stream(kPath, body + R"(, "stream": true})");
  EXPECT_EQ(joined(events, "choices.0.logprobs.token_logprobs"), "null, -1.0, -2.0, -0.5");
}

TEST_F(CompletionsTest, LogprobsTrue) {
  const Json reply = post(kPath, R"({"prompt": "ab", "logprobs": true, "max_tokens": 2})");
  EXPECT_EQ(at(reply, "choices.0.logprobs.tokens"), R"(["H", "e"])");
  EXPECT_EQ(last().top_logprobs, 1);
  const Json none = post(kPath, R"({"prompt": "ab", "logprobs": false, "max_tokens": 2})");
  EXPECT_EQ(at(none, "choices.0.logprobs"), "null");
  const Json ids = post(kPath, R"({"prompt": "ab", "logprobs": 1, "max_tokens": 1,
                                   "return_tokens_as_token_ids": true})");
  EXPECT_EQ(at(ids, "choices.0.logprobs.tokens"), R"(["token_id:75"])");
}

TEST_F(CompletionsTest, ManyPrompts) {
  std::string prompts;
  for (int i = 0; i < 200; ++i) prompts += concat(i > 0 ? ", " : "", "\"", i, "\"");
  const std::string body = R"({"echo": true, "max_tokens": 3, "n": 2, "prompt": [)" + prompts + "]";
  const Json reply = post(kPath, body + "}");
  ASSERT_EQ(status_, 200) << reply.dump().substr(0, 300);
  EXPECT_EQ(reply.find("choices")->items().size(), 400u);
  for (int i = 0; i < 400; ++i)
    ASSERT_EQ(at(reply, concat("choices.", i, ".text")), concat("\"", i / 2, "Hel\""));
  std::vector<std::string> texts(400);
  for (const Event& event : stream(kPath, body + R"(, "stream": true})")) {
    const Json& choice = event.data.find("choices")->items().front();
    texts[static_cast<size_t>(*integer_of(*choice.find("index")))] += choice.find("text")->text();
  }
  for (int i = 0; i < 400; ++i) ASSERT_EQ(texts[static_cast<size_t>(i)], concat(i / 2, "Hel"));
  EXPECT_TRUE(done_);
}

TEST_F(CompletionsTest, PromptLogprobsAndIds) {
  const Json reply = post(kPath, R"({"prompt": "ab", "prompt_logprobs": 1, "max_tokens": 2,
                                     "return_token_ids": true})");
  EXPECT_EQ(at(reply, "choices.0.prompt_logprobs"),
            R"([null, {"100": {"logprob": -1.0, "rank": 2, "decoded_token": "a"}, )"
            R"("0": {"logprob": -0.25, "rank": 1, )"
            R"("decoded_token": "<｜begin▁of▁sentence｜>"}}, )"
            R"({"101": {"logprob": -2.0, "rank": 2, "decoded_token": "b"}, )"
            R"("100": {"logprob": -0.25, "rank": 1, "decoded_token": "a"}}])");
  EXPECT_EQ(at(reply, "choices.0.prompt_token_ids"), "[0, 100, 101]");
  EXPECT_EQ(at(reply, "choices.0.token_ids"), "[75, 104]");
  post(kPath, R"({"prompt": "ab", "prompt_logprobs": 1, "stream": true})");
  EXPECT_EQ(status_, 400);
  const std::vector<Event> events = stream(
      kPath, R"({"prompt": "ab", "max_tokens": 2, "return_token_ids": true, "stream": true})");
  EXPECT_EQ(joined(events, "choices.0.prompt_token_ids"), "0, 100, 101");
  EXPECT_EQ(joined(events, "choices.0.token_ids"), "75, 104");
}

TEST_F(CompletionsTest, SampledLogprobsAndTheWeightsVersion) {
  const Json reply = post(kPath, R"({"prompt": ["ab", "cd"], "max_tokens": 2,
                                     "return_sampled_logprobs": true})");
  for (const char* choice : {"choices.0.", "choices.1."}) {
    EXPECT_EQ(at(reply, concat(choice, "sampled_logprobs")), "[-0.25, -0.25]");
    EXPECT_EQ(at(reply, concat(choice, "weights_version")), "0");
  }
  const std::vector<Event> events = stream(
      kPath,
      R"({"prompt": "ab", "max_tokens": 2, "return_sampled_logprobs": true, "stream": true})");
  EXPECT_EQ(joined(events, "choices.0.sampled_logprobs"), "-0.25, -0.25");
  EXPECT_EQ(at(events.back().data, "choices.0.weights_version"), "0");
  EXPECT_EQ(at(post(kPath, R"({"prompt": "ab", "max_tokens": 2})"), "choices.0.sampled_logprobs"),
            "nothing");
}

TEST_F(CompletionsTest, StopTokens) {
  const Json reply = post(kPath, R"({"prompt": "ab", "stop_token_ids": [111], "logprobs": 0})");
  EXPECT_EQ(at(reply, "choices.0.text"), "\"He\"");
  EXPECT_EQ(at(reply, "choices.0.stop_reason"), "111");
  EXPECT_EQ(at(reply, "choices.0.logprobs.tokens"), R"(["H", "e", "l"])");
  post(kPath, R"({"prompt": "ab", "min_tokens": 5, "max_tokens": 9})");
  EXPECT_EQ(last().min_tokens, 5);
}

TEST_F(CompletionsTest, WhoWritesSpecialTokensHasThem) {
  const std::string bos(text::kBos), user(text::kUser);
  const auto prompt = [&](const std::string& text, const std::string& more) {
    const Json reply = post(kPath, R"({"echo": true, "logprobs": 0, "max_tokens": 0, "prompt": )" +
                                       text::quote_json(text) + more + "}");
    EXPECT_EQ(at(reply, "choices.0.text"), text::quote_json(text));
    return last().prompt;
  };
  const std::vector<int64_t> written = {0, tokenizer_.id_of(user), 100};
  EXPECT_EQ(prompt(bos + user + "a", ""), written);
  EXPECT_EQ(prompt(bos + user + "a", R"(, "add_special_tokens": false)"), written);
  EXPECT_EQ(prompt(user + "a", R"(, "special_tokens": true)"), written);
  EXPECT_EQ(prompt(user + "a", R"(, "add_special_tokens": false)"),
            (std::vector<int64_t>{tokenizer_.id_of(user), 100}));
  // Text stays text elsewhere.
  EXPECT_GT(prompt(user + "a", "").size(), 5u);
  EXPECT_GT(prompt("a" + bos, "").size(), 5u);
  EXPECT_GT(prompt(bos, R"(, "special_tokens": false)").size(), 5u);
}

TEST_F(CompletionsTest, SpecialTokensAreSkippedOnDemand) {
  answers_ = {"a<think>b"};
  const std::string body = R"({"prompt": "x", "logprobs": 0)";
  const Json shown = post(kPath, body + "}");
  EXPECT_EQ(at(shown, "choices.0.text"), "\"a<think>b\"");
  EXPECT_EQ(at(shown, "choices.0.logprobs.text_offset"), "[0, 1, 8, 9]");
  const Json skipped = post(kPath, body + R"(, "skip_special_tokens": true})");
  EXPECT_EQ(at(skipped, "choices.0.text"), "\"ab\"");
  EXPECT_EQ(at(skipped, "choices.0.logprobs.text_offset"), "[0, 1, 1, 2]");
  EXPECT_EQ(at(skipped, "choices.0.logprobs.tokens"), at(shown, "choices.0.logprobs.tokens"));
}

TEST_F(CompletionsTest, RefusesByName) {
  struct Case {
    const char* fields;
    const char* message;
  };
  const std::vector<Case> cases = {
      {R"("suffix": "x")", "suffix: insertion is not supported"},
      {R"("logprobs": 21)", "logprobs: expected an integer from 0 to 20"},
      {R"("prompt_logprobs": -1)", "prompt_logprobs: expected an integer from 0"},
      {R"("stop_token_ids": [999999])", "stop_token_ids"},
      {R"("stop_token_ids": 5)", "stop_token_ids"},
      {R"("min_tokens": 20, "max_tokens": 10)", "min_tokens: more than the 10"},
      {R"("min_tokens": 2, "stop": "x")", "min_tokens"},
      {R"("use_beam_search": true)", "use_beam_search: not supported"},
      {R"("truncate_prompt_tokens": 5)", "truncate_prompt_tokens"},
      {R"("allowed_token_ids": [1])", "allowed_token_ids"},
      {R"("bad_words": ["x"])", "bad_words"},
      {R"("include_stop_str_in_output": true)", "include_stop_str_in_output"},
      {R"("regex": "a", "ebnf": "b")", "ebnf: the answer has a form already, by regex"},
      {R"("guided_choice": [])", "guided_choice"},
      {R"("structured_outputs": {"structural_tag": "x"})", "structured_outputs.structural_tag"},
  };
  for (const Case& c : cases) {
    const Json reply = post(kPath, R"({"prompt": "x", )" + std::string(c.fields) + "}");
    EXPECT_EQ(status_, 400) << c.fields;
    EXPECT_NE(at(reply, "error.message").find(c.message), std::string::npos) << reply.dump();
  }
  EXPECT_TRUE(engine_.requests().empty());
}

TEST_F(CompletionsTest, FieldsThatSayWhatHappensAnywayAreFine) {
  post(kPath, R"({"prompt": "x", "use_beam_search": false, "length_penalty": 1.0, "best_of": 1,
                  "bad_words": [], "allowed_token_ids": null, "logit_bias": null, "stop": null,
                  "include_stop_str_in_output": false, "suffix": null, "user": "u",
                  "spaces_between_special_tokens": true, "made_up": 5})");
  EXPECT_EQ(status_, 200);
}

TEST_F(CompletionsTest, FormsOfTheAnswerInEveryDialect) {
  using Kind = engine_core::Grammar::Kind;
  struct Case {
    const char* fields;
    Kind kind;
    const char* text;
  };
  const std::vector<Case> cases = {
      {R"("regex": "a+")", Kind::kRegex, "a+"},
      {R"("guided_regex": "a+")", Kind::kRegex, "a+"},
      {R"("structured_outputs": {"regex": "a+"})", Kind::kRegex, "a+"},
      {R"("ebnf": "root ::= \"a\"")", Kind::kEbnf, "root ::= \"a\""},
      {R"("guided_grammar": "root ::= \"a\"")", Kind::kEbnf, "root ::= \"a\""},
      {R"("structured_outputs": {"grammar": "root ::= \"a\""})", Kind::kEbnf, "root ::= \"a\""},
      {R"("guided_choice": ["yes", "a \"b\"\n\\"])", Kind::kEbnf,
       R"(root ::= "yes" | "a \"b\"\n\\")"},
      {R"("structured_outputs": {"choice": ["yes"]})", Kind::kEbnf, R"(root ::= "yes")"},
      {R"("guided_json": {"type": "object"})", Kind::kJsonSchema, R"({"type": "object"})"},
      {R"("guided_json": "{\"type\": \"object\"}")", Kind::kJsonSchema, R"({"type": "object"})"},
      {R"("json_schema": "{\"type\": \"object\"}")", Kind::kJsonSchema, R"({"type": "object"})"},
      {R"("structured_outputs": {"json": {"type": "object"}})", Kind::kJsonSchema,
       R"({"type": "object"})"},
      {R"("structured_outputs": {"json_object": true})", Kind::kJsonObject, ""},
      {R"("response_format": {"type": "text"}, "regex": "a")", Kind::kRegex, "a"},
  };
  for (const char* path : {kPath, "/v1/chat/completions"}) {
    for (const Case& c : cases) {
      const Json reply =
          post(path, R"({"prompt": "x", "messages": [{"role": "user", "content": "x"}], )" +
                         std::string(c.fields) + "}");
      ASSERT_EQ(status_, 200) << reply.dump();
      EXPECT_EQ(last().grammar.kind, c.kind) << c.fields;
      EXPECT_EQ(last().grammar.text, c.text) << c.fields;
    }
  }
}

}  // namespace
}  // namespace hadal::server
