// generate, chat, eval, doctor and plot as a user calls them, on models that a test makes.
#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <numbers>
#include <sstream>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "checkpoint/load_model.h"
#include "checkpoint/save_model.h"
#include "cli_fixture.h"
#include "testing/parrot_model.h"
#include "testing/tiny_model.h"
#include "testing/tiny_tokenizer.h"
#include "text/chat_tokens.h"
#include "text/tokenizer.h"

namespace hadal {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

model::ModelConfig config_for(int64_t vocab, int64_t positions = 4096) {
  model::ModelConfig config = testing::small_config();
  config.n_layers = 3;
  config.compress_ratios = {0, 4, 128, 0};
  config.n_routed_experts = 4;
  config.vocab_size = vocab;
  config.max_position_embeddings = positions;
  config.quantized = true;
  config.expert_dtype = model::ExpertDtype::kFp4;
  return config;
}

class Apps : public CliFixture {
 protected:
  void SetUp() override {
    CliFixture::SetUp();
    at::set_num_threads(1);  // matrices too small to share
  }
  std::string save(const model::Transformer& model,
                   const std::vector<std::string>& more = {}) const {
    const std::string tokenizer = write("tokenizer.json", testing::byte_tokenizer_json(more));
    const std::string folder = folder_ / "model";
    checkpoint::save_model(model, folder, {.tokenizer = tokenizer});
    write("model/generation_config.json", R"({"thinking": false})");
    return folder;
  }
  std::string random_model() const {
    return save(testing::random_model(config_for(testing::byte_tokenizer_size()), 3, at::kFloat));
  }
  /// A model that says the texts one after another behind `first`; each is one token.
  std::string saying(std::string_view first,
                     const std::vector<std::string>& texts,
                     int64_t positions = 4096) const {
    std::vector<std::string> more;
    for (const std::string& piece : texts) {
      const auto& known = text::kChatTokens;
      if (piece.size() == 1) continue;  // a byte has a token
      if (std::find(known.begin(), known.end(), piece) == known.end()) more.push_back(piece);
    }
    const text::Tokenizer tokenizer =
        text::Tokenizer::from_json(testing::byte_tokenizer_json(more), "test");
    std::vector<int64_t> ids;
    for (const std::string& piece : texts) ids.push_back(tokenizer.id_of(piece));
    ids.push_back(tokenizer.id_of(text::kEos));
    return save(testing::parrot_model(config_for(tokenizer.vocab_size(), positions),
                                      testing::chain(tokenizer.id_of(first), ids)),
                more);
  }
  /// A model that says abababab ... for ever, in answers, too.
  std::string endless() const {
    const text::Tokenizer tokenizer =
        text::Tokenizer::from_json(testing::byte_tokenizer_json(), "test");
    const int64_t a = tokenizer.id_of("a"), b = tokenizer.id_of("b");
    return save(testing::parrot_model(config_for(tokenizer.vocab_size()),
                                      {{a, b}, {b, a}, {tokenizer.id_of("</think>"), a}}));
  }
  /// Runs the program and sends SIGINT, from its first output on, until it ends.
  CliResult interrupt(const std::string& arguments, const std::string& input = "") const {
    const std::string in = write("in", input), out = write("out", ""), error = write("error", "");
    const std::string script = std::string(HADAL_BINARY) + " " + arguments + " < " + in + " > " +
                               out + " 2> " + error + " & p=$!; for i in $(seq 600); do [ -s " +
                               out +
                               " ] && break; sleep 0.05; done; "
                               "while kill -INT $p 2> /dev/null; do sleep 0.2; done; wait $p";
    const int status = std::system(script.c_str());
    CliResult result;
    result.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    result.out = slurp(out);
    result.error = slurp(error);
    return result;
  }
};
class Generate : public Apps {};
class Chat : public Apps {};
class Eval : public Apps {};
class Convert : public Apps {};
class Doctor : public Apps {};
class Plot : public Apps {};

std::vector<Json> lines_of(const std::string& text) {
  std::vector<Json> lines;
  std::istringstream in(text);
  std::string line;
  while (std::getline(in, line)) lines.push_back(Json::parse(line));
  return lines;
}

TEST_F(Generate, StreamsWhatTheJsonHolds) {
  const std::string model = random_model();
  const std::string flags =
      "generate --model " + model + " --prompt 'Call me' --max-tokens 20 --seed 3";
  const CliResult json = run(flags + " --json");
  ASSERT_EQ(json.code, 0) << json.error;
  const Json result = Json::parse(json.out);
  EXPECT_EQ(result["prompt_tokens"], 8);
  EXPECT_LE(result["tokens"].size(), 20u);
  const CliResult text = run(flags);
  EXPECT_EQ(text.out, "Call me" + result["text"].get<std::string>() + "\n");
  EXPECT_EQ(run(flags).out, text.out) << "the same seed gave another text";
}

TEST_F(Generate, FindsTheDefaultModel) {
  const std::string model = saying("k", {"ing", " of", " fish"});
  const std::string flags = "generate --prompt 'a k' --temperature 0 --json";
  const CliResult named = run(flags, "", "HADAL_MODEL=" + model);
  ASSERT_EQ(named.code, 0) << named.error;
  EXPECT_EQ(Json::parse(named.out)["text"], "ing of fish");
  EXPECT_EQ(Json::parse(named.out)["finish_reason"], "stop");
  expect_refused(run(flags, "", "HADAL_MODEL=/nowhere/at-all"), "/nowhere/at-all");

  // Beside the program, and above it.
  fs::create_directories(folder_ / "models");
  fs::create_directories(folder_ / "build/cpu");
  fs::rename(model, folder_ / "models/hadal-nano");
  const std::string program = folder_ / "build/cpu/hadal";
  fs::copy_file(HADAL_BINARY, program);
  const CliResult found = run(flags, "", "", program);
  ASSERT_EQ(found.code, 0) << found.error;
  EXPECT_EQ(Json::parse(found.out)["text"], "ing of fish");
}

TEST_F(Generate, InterruptedItEndsCleanly) {
  const CliResult result = interrupt(
      "generate --prompt a --max-tokens 1000000 --temperature 0 "
      "--model " +
      endless());
  EXPECT_EQ(result.code, 1) << result.error;
  EXPECT_TRUE(result.out.starts_with("ab")) << result.out.substr(0, 100);
  EXPECT_NE(result.error.find("generated: "), std::string::npos) << result.error;
}

TEST_F(Chat, AnInterruptStopsTheAnswerAndNotTheProgram) {
  const CliResult result =
      interrupt("chat --max-tokens 1000000 --temperature 0 --model " + endless(), "one\ntwo\n");
  EXPECT_EQ(result.code, 0) << result.error;
  const size_t first = result.error.find("[stopped]");
  ASSERT_NE(first, std::string::npos) << result.error;
  EXPECT_NE(result.error.find("[stopped]", first + 1), std::string::npos) << result.error;
}

TEST_F(Chat, AnswersLineByLine) {
  const std::string model = saying("</think>", {"Gr\u00fc\u00df", " Gott", "\xF0\x9F\x90\x8B!"});
  const CliResult result = run("chat --model " + model, "hello\n\n/help\nagain\n/quit\nnever\n");
  EXPECT_EQ(result.code, 0) << result.error;
  EXPECT_EQ(result.out, "Gr\u00fc\u00df Gott\U0001F40B!\nGr\u00fc\u00df Gott\U0001F40B!\n");
  EXPECT_NE(result.error.find("/reset"), std::string::npos);
  EXPECT_NE(run("chat --model " + model, "/rest\n").error.find("no command /rest"),
            std::string::npos);
}

TEST_F(Chat, ShowsReasoningBeforeTheAnswer) {
  const std::string model = saying("<think>", {"be", " brief", "</think>", "Hi", " you"});
  const std::string flags = "chat --thinking-mode thinking --model " + model;
  EXPECT_EQ(run(flags, "hello\n").out, "be brief\n\nHi you\n");
  const auto lines = lines_of(run(flags + " --json", "hello\nand again\n").out);
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0]["reasoning_content"], "be brief");
  EXPECT_EQ(lines[0]["content"], "Hi you");
  EXPECT_EQ(lines[0]["finish_reason"], "stop");
  EXPECT_TRUE(lines[0]["error"].is_null());
  // The second prompt drops the first answer's reasoning, which begins with the first prompt's last
  // token: the state up to there is still used.
  EXPECT_EQ(lines[1]["reused_tokens"], lines[0]["prompt_tokens"].get<int64_t>() - 1);
}

TEST_F(Chat, GoesOnExactlyWhereTheLastTurnEnded) {
  // Without reasoning all is used; the token that ended the answer was drawn and not computed.
  // Bytes, because text of the history is never read as a token of its own.
  const auto plain = lines_of(
      run("chat --json --model " + saying("</think>", {"H", "i"}), "hello\nand again\n").out);
  ASSERT_EQ(plain.size(), 2u);
  EXPECT_EQ(plain[1]["reused_tokens"],
            plain[0]["prompt_tokens"].get<int64_t>() + plain[0]["tokens"].get<int64_t>() - 1);
}

TEST_F(Chat, AsksForTheResultsOfToolCalls) {
  const std::string dsml = "\uff5cDSML\uff5c";
  const std::string model = saying(
      "</think>",
      {"One moment.", "\n\n<" + dsml + "tool", "_calls>\n<" + dsml + "invoke name",
       "=\"look\">\n<" + dsml + "parameter name=\"at\" string=\"tr",
       "ue\">the sea</" + dsml + "parameter>\n</", dsml + "invoke>\n</" + dsml + "tool_calls>"});
  const std::string tools = write(
      "tools.json", R"([{"type": "function", "function": {"name": "look", "parameters": {}}}])");
  const std::string flags = "chat --model " + model + " --tools " + tools;
  const std::string once = "One moment.\ncall look({\"at\": \"the sea\"})\n";
  const CliResult result = run(flags, "what is out there?\nwater\n");
  EXPECT_EQ(result.code, 0) << result.error;
  EXPECT_EQ(result.out, once + once) << "the result of the call is another turn";
  EXPECT_EQ(result.out.find("DSML"), std::string::npos);
  const auto lines = lines_of(run(flags + " --json", "what?\nwater\n").out);
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0]["tool_calls"][0]["function"]["name"], "look");
  EXPECT_GT(lines[1]["prompt_tokens"], lines[0]["prompt_tokens"]);
  expect_refused(run("chat --model " + model + " --tools " + write("bad.json", "{}"), "a\n"),
                 "expected a list of tools");
}

TEST_F(Apps, EvalToolCallsCountsForms) {
  const std::string dsml(text::kDsml);
  const std::string model = saying(
      text::kThinkEnd,
      {"One moment.", "\n\n<" + dsml + "tool_calls>\n<" + dsml + "invoke name=\"look\">\n<" + dsml,
       "parameter name=\"at\" string=\"true\">the sea</" + dsml + "parameter>\n</" + dsml +
           "invoke>\n</",
       dsml + "tool_calls>"});
  const auto dialogue = [](const std::string& tool, const std::string& recorded,
                           const std::string& at) {
    return Json{{"messages",
                 {{{"role", "user"}, {"content", "hi"}},
                  {{"role", "assistant"},
                   {"content", ""},
                   {"tool_calls",
                    {{{"type", "function"},
                      {"function",
                       {{"name", recorded}, {"arguments", Json{{"at", at}}.dump()}}}}}}}}},
                {"tools", {{{"type", "function"}, {"function", {{"name", tool}}}}}}}
               .dump() +
           "\n";
  };
  const std::string file = write(
      "dialogues.jsonl", dialogue("look", "look", "the sea") + dialogue("look", "look", "me") +
                             dialogue("look", "go", "me") + dialogue("go", "go", "me"));
  const CliResult result = run("eval tool-calls " + file + " --model " + model + " --json");
  ASSERT_EQ(result.code, 0) << result.error;
  const Json score = Json::parse(result.out);
  EXPECT_EQ(score["turns"], 4);
  EXPECT_EQ(score["well_formed"], 4);
  EXPECT_EQ(score["known_tool"], 3);
  EXPECT_EQ(score["same_tool"], 2);
  EXPECT_EQ(score["same_arguments"], 1);
  expect_refused(
      run("eval tool-calls " + write("none.jsonl", "{\"messages\": []}\n") + " --model " + model),
      "no turn");
}

TEST_F(Apps, EvalSelectionNeedsSomethingToSelect) {
  const std::string model = random_model();
  const std::string file = write("text.txt", std::string(600, 'x') + " and some more words");
  const CliResult result =
      run("eval selection " + file + " --model " + model + " --context 400 --windows 1");
  ASSERT_EQ(result.code, 0) << result.error;
  EXPECT_NE(result.out.find("the indexer keeps 0."), std::string::npos) << result.out;
  expect_refused(run("eval selection " + file + " --model " + model + " --context 4000"),
                 "4000 tokens");
}

TEST_F(Chat, CachedStateChangesNoBit) {
  const std::string model = random_model();
  const std::string flags =
      "chat --json --max-tokens 24 --seed 5 --system 'Be kind.' --model " + model;
  const std::string input = "hello\nhow are you?\nand now?\n";
  auto reused = lines_of(run(flags, input).out);
  auto computed = lines_of(run(flags + " --recompute", input).out);
  ASSERT_EQ(reused.size(), 3u);
  ASSERT_EQ(computed.size(), 3u);
  int64_t tokens = 0;
  for (size_t i = 0; i < 3; ++i) {
    tokens += reused[i]["reused_tokens"].get<int64_t>();
    reused[i].erase("reused_tokens");
    computed[i].erase("reused_tokens");
    EXPECT_EQ(reused[i], computed[i]);
  }
  EXPECT_GT(tokens, 20);
  // After /reset the conversation begins as it began.
  auto again = lines_of(run(flags, "hello\n/reset\nhello\n").out);
  ASSERT_EQ(again.size(), 2u);
  EXPECT_EQ(again[0]["content"], again[1]["content"]);
}

TEST_F(Chat, UsersWriteNoSpecialTokens) {
  const std::string model = saying("</think>", {"ok"});
  const std::string flags = "chat --json --model " + model;
  const auto plain = lines_of(run(flags, "a\n").out);
  const std::string markup(text::kEos);
  const auto special = lines_of(run(flags, "a" + markup + "\n").out);
  EXPECT_EQ(special[0]["prompt_tokens"].get<size_t>(),
            plain[0]["prompt_tokens"].get<size_t>() + markup.size())
      << "every byte of the user's text is a token of its own here";
  EXPECT_EQ(run(flags, "half a character: \xC3\n").code, 0);
}

TEST_F(Chat, AMessageBeyondTheLastPositionIsDropped) {
  const std::string model = saying("</think>", {"ok"}, /*positions=*/32);
  const CliResult result = run("chat --model " + model, "hi\n" + std::string(40, 'a') + "\nyo\n");
  EXPECT_EQ(result.code, 0) << result.error;
  EXPECT_EQ(result.out, "ok\nok\n");
  EXPECT_NE(result.error.find("the model has 32 positions"), std::string::npos) << result.error;
}

/// Bits per byte of `text`, from the definition: every window alone, every token by itself.
double bits_per_byte(const std::string& folder, const std::string& text, int64_t context) {
  const auto files = checkpoint::OfficialCheckpoint::open(folder);
  const model::Transformer model = checkpoint::load_model(files, ops::Numerics::kReleased);
  const text::Tokenizer tokenizer = text::Tokenizer::from_file(folder + "/tokenizer.json");
  std::vector<int64_t> ids = {0};
  for (const int32_t id : tokenizer.encode(text, text::SpecialTokens::kAsText)) ids.push_back(id);
  const auto count = static_cast<int64_t>(ids.size());
  double nats = 0.0;
  const at::NoGradGuard no_grad;
  for (int64_t token = 1; token < count; ++token) {
    // The first window that holds it: tokens of the second half belong to the window before.
    const int64_t half = context / 2;
    const int64_t window = token < context ? 0 : (token - context) / half + 1;
    const std::vector<int64_t> part(ids.begin() + window * half, ids.begin() + token);
    const ops::Batch batch({std::ssize(part)}, {0}, at::kCPU);
    model::ForwardContext forward;
    forward.batch = &batch;
    forward.numerics = ops::Numerics::kReleased;
    const at::Tensor streams = model.forward(at::tensor(part, at::kLong), forward).streams;
    const at::Tensor last = streams.narrow(0, streams.size(0) - 1, 1);
    const at::Tensor logits =
        model.logits(model.head_input(last, forward.numerics), forward.numerics).to(at::kDouble);
    nats -= at::log_softmax(logits, 1)[0][ids[static_cast<size_t>(token)]].item<double>();
  }
  return nats / std::numbers::ln2 / static_cast<double>(text.size());
}

double last_line_bits(const std::string& out) {
  const size_t end = out.rfind(" bits per byte\n");
  EXPECT_EQ(end + 15, out.size()) << out;
  const size_t begin = out.find_last_of(" \n", end - 1);
  return std::strtod(out.c_str() + (begin == std::string::npos ? 0 : begin + 1), nullptr);
}

TEST_F(Eval, GivesTheBitsOfTheDefinition) {
  const std::string model = random_model();
  const std::string text = "Some years ago \u2014 never mind how long";
  const std::string file = write("text.txt", text);
  const std::string flags = "eval perplexity " + file + " --model " + model;
  const CliResult whole = run(flags);
  ASSERT_EQ(whole.code, 0) << whole.error;
  EXPECT_NE(whole.out.find("windows of 4096 tokens"), std::string::npos);
  EXPECT_NEAR(last_line_bits(whole.out), bits_per_byte(model, text, 4096), 1e-5);
  const CliResult windows = run(flags + " --context 32");
  EXPECT_NEAR(last_line_bits(windows.out), bits_per_byte(model, text, 32), 1e-5);
  EXPECT_NE(last_line_bits(windows.out), last_line_bits(whole.out));
  // How many windows share a step changes no digit.
  EXPECT_EQ(run(flags + " --context 32 --step-tokens 1").out, windows.out);
  const Json json = Json::parse(run(flags + " --context 31 --json").out);
  EXPECT_EQ(json["bytes"], text.size());
  EXPECT_EQ(json["tokens"], text.size());
  EXPECT_NEAR(json["nats_per_token"].get<double>() / std::numbers::ln2,
              json["bits_per_byte"].get<double>(), 1e-9);
}

TEST_F(Eval, TakesTheMeanOverDocuments) {
  const std::string model = random_model();
  const std::string file = write("books.jsonl",
                                 "{\"body\": \"abcdefghij\"}\n{\"body\": \"\u00e4\u00f6\u00fc\"}\n"
                                 "{\"body\": \"abcdefghijklm\"}\n");
  const std::string flags =
      "eval perplexity " + file + " --model " + model + " --field body --max-bytes 5";
  const Json json = Json::parse(run(flags + " --json").out);
  ASSERT_EQ(json["documents"].size(), 3u);
  EXPECT_EQ(json["documents"][0], json["documents"][2]) << "the same first five bytes";
  EXPECT_EQ(json["documents"][1]["bytes"], 4) << "half a character was scored";
  const double first = json["documents"][0]["bits_per_byte"];
  const double second = json["documents"][1]["bits_per_byte"];
  EXPECT_NEAR(json["mean_bits_per_byte"].get<double>(), (2 * first + second) / 3, 1e-9);
  const CliResult text = run(flags);
  EXPECT_NE(text.out.find("document 3: 5 tokens, 5 bytes"), std::string::npos) << text.out;
  EXPECT_NEAR(last_line_bits(text.out), (2 * first + second) / 3, 1e-5);
}

TEST_F(Eval, RefusesWhatHasNoScore) {
  const std::string model = random_model();
  const auto refused = [&](const std::string& arguments, const std::string& why) {
    CliResult result = run("eval perplexity --model " + model + " " + arguments);
    expect_refused(result, why);
  };
  refused(write("empty.txt", ""), "holds no text");
  refused(write("latin.txt", "caf\xE9 au lait"), "no UTF-8 at byte 3");
  refused(write("a.jsonl", "{\"text\": 1}\n"), "line 1");
  expect_refused(run("eval"), "see hadal eval --help");
}

TEST_F(Convert, TellsWhatItDid) {
  const std::string model = random_model();
  const std::string out = folder_ / "bf16";
  const CliResult there = run("convert --in " + model + " --out " + out + " --to bf16");
  ASSERT_EQ(there.code, 0) << there.error;
  EXPECT_NE(there.out.find("original scales are kept"), std::string::npos) << there.out;
  EXPECT_NE(there.out.find("lossless"), std::string::npos) << there.out;
  const CliResult back =
      run("convert --in " + out + " --out " + (folder_ / "back").string() + " --to official");
  EXPECT_NE(back.out.find("have their original bytes"), std::string::npos) << back.out;
  EXPECT_EQ(slurp(folder_ / "back/model.safetensors"), slurp(model + "/model.safetensors"));
  EXPECT_EQ(slurp(folder_ / "back/tokenizer.json"), slurp(model + "/tokenizer.json"));
  const CliResult hf =
      run("convert --in " + model + " --out " + (folder_ / "hf").string() + " --to hf-bf16");
  EXPECT_NE(hf.out.find("mtp.*"), std::string::npos) << hf.out;
  expect_refused(run("convert --in " + model + " --out " + out + " --to bf16"), "exists");
  expect_refused(run("convert --in /nowhere --out " + out + "2 --to bf16"), "/nowhere");
  expect_refused(run("convert --in " + model + " --out " + out + "2 --to gguf"), "gguf");
}

TEST_F(Doctor, TellsWhatFits) {
  const std::string model = random_model();
  const std::string smi =
      write("nvidia-smi", "#!/bin/sh\necho 'Some GPU, 200000, 190000, 999.1'\n");
  fs::permissions(smi, fs::perms::owner_all);
  const std::string setup = "HADAL_MODEL=" + model + " PATH=" + folder_.string() + ":$PATH";
  const CliResult result = run("doctor --json", "", setup);
  ASSERT_EQ(result.code, 0) << result.error;
  const Json json = Json::parse(result.out);
  EXPECT_GT(json["memory"]["total_bytes"], 0);
  EXPECT_GE(json["cpu"]["processors"], 1);
  EXPECT_EQ(json["gpus"][0]["name"], "Some GPU");
  EXPECT_EQ(json["gpu_driver"], "999.1");
  EXPECT_EQ(json["default_model"]["found"], model);
  ASSERT_EQ(json["models"].size(), 5u);
  EXPECT_EQ(json["models"][1]["name"], "V4-Flash");
  EXPECT_EQ(json["models"][1]["bytes"], 159609485896);
  EXPECT_EQ(json["models"][1]["fits_gpu"], true);
  EXPECT_EQ(json["models"][3]["bytes"], 864704792696);
  EXPECT_EQ(json["models"][3]["fits_gpu"], false);
  const CliResult text = run("doctor", "", "HADAL_MODEL=/nowhere");
  EXPECT_EQ(text.code, 0);
  EXPECT_NE(text.out.find("looked in /nowhere"), std::string::npos) << text.out;
  EXPECT_NE(text.out.find("V4-Pro-Base"), std::string::npos);
}

TEST_F(Plot, DrawsWhatTheMetricsHold) {
  std::string lines;
  for (int step = 1; step <= 100; ++step) {
    lines += "{\"step\": " + std::to_string(step) + ", \"tokens\": " + std::to_string(step * 1000) +
             ", \"time\": 1, \"loss/main\": " + std::to_string(9.0 / step) +
             ", \"grad_norm\": null, \"stage\": " + std::to_string(step > 60 ? 1.0 : 0.0) + "}\n";
  }
  const std::string file = write("metrics.jsonl", lines);
  const std::string out = folder_ / "curve.svg";
  const CliResult result = run("plot " + file + " --out " + out + " --smooth 5");
  ASSERT_EQ(result.code, 0) << result.error;
  const std::string svg = slurp(out);
  EXPECT_TRUE(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
  for (const char* part : {"loss/main", "stage 1", ">tokens<", "stroke-dasharray"})
    EXPECT_NE(svg.find(part), std::string::npos) << part;
  EXPECT_EQ(run("plot " + file + " --out " + out + " --x step --keys loss/main,stage").code, 0);
  expect_refused(run("plot " + file + " --out " + out + " --keys loss/none"),
                 "has no \"loss/none\"; it has loss/main, stage");
  expect_refused(run("plot " + write("bad.jsonl", "x\n") + " --out " + out), "line 1");
}

class Help : public CliFixture {};
TEST_F(Help, EverySubcommandShowsAnExample) {
  const std::string all = run("--help").out;
  for (const char* name : {"chat", "plot"}) {
    EXPECT_NE(all.find(std::string("  ") + name + " "), std::string::npos) << name;
    const CliResult help = run(std::string(name) + " --help");
    EXPECT_EQ(help.code, 0);
    EXPECT_NE(help.out.find(std::string("hadal ") + name), std::string::npos) << help.out;
  }
  EXPECT_NE(run("eval perplexity --help").out.find("hadal eval perplexity"), std::string::npos);
}

}  // namespace
}  // namespace hadal
