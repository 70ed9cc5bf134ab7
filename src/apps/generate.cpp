// hadal generate: a prompt continued, streamed, with its speed.
#include <chrono>
#include <cstdio>
#include <memory>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "apps/command.h"
#include "apps/decode_loop.h"
#include "apps/interrupt.h"
#include "base/check.h"

namespace hadal::apps {
namespace {

struct Flags {
  std::string model, prompt, numerics;
  int64_t max_tokens = 128;
  ops::SamplingParams sampling;
  bool json = false;
};

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

int run(const Flags& flags) {
  const LoadedModel loaded = load_with_tokenizer(flags.model, flags.numerics);
  std::vector<int64_t> ids = {loaded.config().bos_token_id};
  for (const int32_t id : loaded.tokenizer.encode(flags.prompt, text::SpecialTokens::kAsText))
    ids.push_back(id);
  Sequence sequence(loaded);
  const InterruptFlag interrupt;
  const StopFunction stop = [&] { return interrupt.raised(); };

  const auto start = std::chrono::steady_clock::now();
  if (!flags.json) std::printf("%s", flags.prompt.c_str());
  const bool complete = sequence.append(ids, stop);
  const double prompt_seconds = seconds_since(start);
  text::DecodeStream decoder(loaded.tokenizer);
  std::string generated;
  std::vector<int64_t> tokens;
  const auto emit = [&](const std::string& piece) {
    generated += piece;
    if (!flags.json) std::fwrite(piece.data(), 1, piece.size(), stdout);
    if (!flags.json) std::fflush(stdout);
  };
  const auto decode_start = std::chrono::steady_clock::now();
  Finish finish = Finish::kInterrupted;
  if (complete) {
    finish = decode(
        loaded, sequence, flags.sampling, flags.max_tokens,
        [&](int64_t token) {
          tokens.push_back(token);
          if (token != loaded.config().eos_token_id) {
            emit(decoder.push(static_cast<int32_t>(token)));
          }
          return true;
        },
        stop);
  }
  emit(decoder.flush());
  const double decode_seconds = seconds_since(decode_start);
  const double prompt_rate = static_cast<double>(ids.size()) / prompt_seconds;
  const double decode_rate = static_cast<double>(tokens.size()) / decode_seconds;
  if (flags.json) {
    const nlohmann::ordered_json result = {{"prompt", flags.prompt},
                                           {"text", generated},
                                           {"tokens", tokens},
                                           {"finish_reason", finish_name(finish)},
                                           {"prompt_tokens", ids.size()},
                                           {"prompt_tokens_per_second", prompt_rate},
                                           {"tokens_per_second", decode_rate}};
    std::printf("%s\n",
                result.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  } else {
    std::printf("\n");
    std::fprintf(stderr,
                 "prompt: %zu tokens, %.0f tokens/s; generated: %zu tokens, %.0f tokens/s\n",
                 ids.size(), prompt_rate, tokens.size(), decode_rate);
  }
  return finish == Finish::kInterrupted ? 1 : 0;
}

}  // namespace

std::function<int()> define_generate(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  app.add_option("--model", flags->model,
                 "checkpoint folder with tokenizer.json; default: the shipped model");
  app.add_option("--prompt", flags->prompt, "text to continue")->required();
  app.add_option("--max-tokens", flags->max_tokens, "tokens to generate at most")
      ->check(CLI::PositiveNumber);
  app.add_option("--temperature", flags->sampling.temperature, "0: always the most likely token")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--top-p", flags->sampling.top_p, "keep the most likely tokens of this mass")
      ->check(CLI::Range(0.0, 1.0));
  app.add_option("--seed", flags->sampling.seed, "same seed, same text");
  app.add_option("--numerics", flags->numerics,
                 "ideal, bf16 or released; default: by the checkpoint's scales");
  app.add_flag("--json", flags->json, "one JSON object instead of a stream");
  return [flags] { return run(*flags); };
}

}  // namespace hadal::apps
