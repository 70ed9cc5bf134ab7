// hadal generate: a prompt continued, streamed, with its speed.
#include <chrono>
#include <cstdio>
#include <memory>

#include <ATen/ATen.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "apps/command.h"
#include "base/check.h"
#include "checkpoint/load_model.h"
#include "model/contiguous_kv.h"
#include "ops/sampling/sample.h"
#include "text/tokenizer.h"

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

/// One sequence that grows: the model, its cache and where it stands.
class Sequence {
 public:
  Sequence(const model::Transformer& model, ops::Numerics numerics, int64_t max_tokens)
      : model_(model),
        numerics_(numerics),
        kv_(model.config(),
            1,
            max_tokens,
            numerics == ops::Numerics::kIdeal ? at::kFloat : at::kBFloat16,
            at::kCPU) {}

  /// Feeds ids and returns the logits after the last, [vocab] FP32.
  at::Tensor feed(const std::vector<int64_t>& ids) {
    const at::NoGradGuard no_grad;
    constexpr int64_t kChunk = 512;
    at::Tensor last;
    for (size_t begin = 0; begin < ids.size(); begin += kChunk) {
      const auto count = static_cast<int64_t>(std::min<size_t>(kChunk, ids.size() - begin));
      const ops::Batch batch = kv_.begin({0}, {count});
      model::ForwardContext context;
      context.batch = &batch;
      context.numerics = numerics_;
      context.kv = &kv_;
      const std::vector<int64_t> part(ids.begin() + static_cast<int64_t>(begin),
                                      ids.begin() + static_cast<int64_t>(begin) + count);
      const at::Tensor streams = model_.forward(at::tensor(part, at::kLong), context);
      last = streams.narrow(0, count - 1, 1);
      kv_.advance();
    }
    return model_.logits(model_.head_input(last, numerics_), numerics_)[0].contiguous();
  }
  int64_t length() const { return kv_.length(0); }

 private:
  const model::Transformer& model_;
  ops::Numerics numerics_;
  model::ContiguousKv kv_;
};

int run(const Flags& flags) {
  const auto source = checkpoint::OfficialCheckpoint::open(flags.model);
  const ops::Numerics numerics = flags.numerics.empty() ? checkpoint::default_numerics(source)
                                                        : ops::parse_numerics(flags.numerics);
  const model::Transformer model = checkpoint::load_model(source, numerics);
  const model::ModelConfig& config = model.config();
  const text::Tokenizer tokenizer = text::Tokenizer::from_file(flags.model + "/tokenizer.json");
  std::vector<int64_t> ids = {config.bos_token_id};
  for (const int32_t id : tokenizer.encode(flags.prompt, text::SpecialTokens::kAsText))
    ids.push_back(id);
  HADAL_INPUT_CHECK(*std::max_element(ids.begin(), ids.end()) < config.vocab_size, flags.model,
                    ": the tokenizer gives ids beyond the model's vocabulary of ",
                    config.vocab_size);
  Sequence sequence(model, numerics, static_cast<int64_t>(ids.size()) + flags.max_tokens);

  const auto start = std::chrono::steady_clock::now();
  at::Tensor logits = sequence.feed(ids);
  const double prompt_seconds = seconds_since(start);
  if (!flags.json) std::printf("%s", flags.prompt.c_str());
  text::DecodeStream decoder(tokenizer);
  std::string generated;
  std::vector<int64_t> tokens;
  const auto emit = [&](const std::string& piece) {
    generated += piece;
    if (!flags.json) std::fwrite(piece.data(), 1, piece.size(), stdout);
    if (!flags.json) std::fflush(stdout);
  };
  const auto decode_start = std::chrono::steady_clock::now();
  bool ended = false;
  while (static_cast<int64_t>(tokens.size()) < flags.max_tokens) {
    const std::span<const float> row(logits.const_data_ptr<float>(),
                                     static_cast<size_t>(config.vocab_size));
    const int64_t token = ops::sample_token(row, flags.sampling, sequence.length());
    tokens.push_back(token);
    ended = token == config.eos_token_id;
    if (ended) break;
    emit(decoder.push(static_cast<int32_t>(token)));
    if (static_cast<int64_t>(tokens.size()) < flags.max_tokens) logits = sequence.feed({token});
  }
  emit(decoder.flush());
  const double decode_seconds = seconds_since(decode_start);
  const double prompt_rate = static_cast<double>(ids.size()) / prompt_seconds;
  const double decode_rate = static_cast<double>(tokens.size()) / decode_seconds;
  if (flags.json) {
    const nlohmann::ordered_json result = {{"prompt", flags.prompt},
                                           {"text", generated},
                                           {"tokens", tokens},
                                           {"finish_reason", ended ? "stop" : "length"},
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
  return 0;
}

}  // namespace

std::function<int()> define_generate(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  app.add_option("--model", flags->model, "checkpoint folder with tokenizer.json")->required();
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
