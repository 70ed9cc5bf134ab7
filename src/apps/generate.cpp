// hadal generate: a prompt continued, streamed, with its speed.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "apps/answer_engine.h"
#include "apps/command.h"
#include "apps/flags.h"
#include "apps/interrupt.h"
#include "apps/loaded_model.h"
#include "apps/perplexity.h"
#include "apps/text_io.h"
#include "base/check.h"
#include "base/log.h"

namespace hadal::apps {
namespace {

struct GenerateFlags {
  std::string model, prompt, prompt_file, numerics;
  bool prompt_given = false;
  int64_t max_tokens = 128;
  SamplingFlags sampling;
  bool json = false;
};

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double rate(int64_t count, double seconds) {
  return count > 0 && seconds > 0 ? static_cast<double>(count) / seconds : 0;
}

/// The text to continue: of the flag, of a file, or of standard input. The newline at the end of a
/// file is the editor's or the shell's, not the text's.
std::string read_prompt(const GenerateFlags& flags) {
  HADAL_INPUT_CHECK(!flags.prompt_given || flags.prompt_file.empty(),
                    "generate: --prompt and --prompt-file are both given");
  if (flags.prompt_given) return flags.prompt;
  HADAL_INPUT_CHECK(!flags.prompt_file.empty() || isatty(STDIN_FILENO) == 0,
                    "generate: no text: give --prompt, --prompt-file or standard input");
  std::string text = read_input(flags.prompt_file);
  if (text.ends_with('\n')) text.pop_back();
  if (text.ends_with('\r')) text.pop_back();
  check_text(text, flags.prompt_file.empty() ? "standard input" : flags.prompt_file);
  return text;
}

int run(GenerateFlags flags) {
  flags.prompt = read_prompt(flags);
  const LoadedModel loaded = load_with_tokenizer(flags.model, flags.numerics);
  std::vector<int64_t> ids = {loaded.config().bos_token_id};
  for (const int32_t id : loaded.tokenizer.encode(flags.prompt, text::SpecialTokens::kAsText))
    ids.push_back(id);
  log::set_level(log::Level::kWarn);  // the terminal is for the text
  AnswerEngine engine(loaded);
  engine_core::Request request;
  request.prompt = ids;
  request.max_tokens = std::min(flags.max_tokens, engine.room_behind(std::ssize(ids), "generate"));
  request.sampling = flags.sampling.over(loaded.defaults.sampling);
  const InterruptFlag interrupt;

  const auto start = std::chrono::steady_clock::now();
  if (!flags.json) write_output(flags.prompt);
  double prompt_seconds = 0;
  const Answered answered = engine.answer(
      std::move(request),
      [&](const engine_core::OutputToken& token) {
        if (prompt_seconds == 0) prompt_seconds = seconds_since(start);
        // Nobody waits for an answer that cannot be written.
        if (!flags.json) write_output(token.text);
      },
      [&] { return interrupt.raised(); });
  const Finish finish = answered.finish;
  const std::vector<int64_t>& tokens = answered.tokens;
  // The first token is the prompt's; the others take a step each.
  const double decode_seconds = seconds_since(start) - prompt_seconds;
  const double prompt_rate = rate(std::ssize(ids), prompt_seconds);
  const double decode_rate = rate(std::ssize(tokens) - 1, decode_seconds);
  if (flags.json) {
    const nlohmann::ordered_json result = {{"prompt", flags.prompt},
                                           {"text", answered.text},
                                           {"tokens", tokens},
                                           {"finish_reason", finish_name(finish)},
                                           {"prompt_tokens", ids.size()},
                                           {"prompt_tokens_per_second", prompt_rate},
                                           {"tokens_per_second", decode_rate}};
    std::printf("%s\n",
                result.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  } else {
    write_output("\n");
    std::fprintf(stderr,
                 "prompt: %zu tokens, %.0f tokens/s; generated: %zu tokens, %.0f tokens/s\n",
                 ids.size(), prompt_rate, tokens.size(), decode_rate);
  }
  return finish == Finish::kInterrupted ? 1 : 0;
}

}  // namespace

std::function<int()> define_generate(CLI::App& app) {
  auto flags = std::make_shared<GenerateFlags>();
  app.add_option("--model", flags->model,
                 "checkpoint folder with tokenizer.json; default: the shipped model");
  CLI::Option* prompt =
      app.add_option("--prompt", flags->prompt, "text to continue; default: standard input");
  app.add_option("--prompt-file", flags->prompt_file, "file with the text; -: standard input");
  app.add_option("--max-tokens", flags->max_tokens, "tokens to generate at most")->check(above(0));
  flags->sampling.define(app);
  app.add_option("--numerics", flags->numerics,
                 "ideal, bf16, released or fp8; default: by the checkpoint's storage");
  app.add_flag("--json", flags->json, "one JSON object instead of a stream");
  return [flags, prompt] {
    flags->prompt_given = prompt->count() > 0;
    return run(*flags);
  };
}

}  // namespace hadal::apps
