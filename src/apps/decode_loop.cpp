#include "apps/decode_loop.h"

#include <algorithm>
#include <span>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include "apps/model_folder.h"
#include "base/check.h"
#include "base/memory.h"

namespace hadal::apps {
namespace {

constexpr int64_t kChunk = 512;  // tokens a step of a prompt; no bit depends on it
constexpr int64_t kSlack = 8;    // tokens that set_tokens() takes back without starting over

}  // namespace

LoadedModel load_with_tokenizer(const std::string& folder_flag, const std::string& numerics_flag) {
  // The work is in hadal's own kernels, which have their own threads; LibTorch's would only wait
  // busily for the few operations between them, at the expense of everything else on the machine.
  at::set_num_threads(1);
  const std::string folder = model_folder(folder_flag);
  const auto source = checkpoint::OfficialCheckpoint::open(folder);
  const ops::Numerics numerics = numerics_flag.empty() ? checkpoint::default_numerics(source)
                                                       : ops::parse_numerics(numerics_flag);
  text::Tokenizer tokenizer = text::Tokenizer::from_file(folder + "/tokenizer.json");
  HADAL_INPUT_CHECK(tokenizer.vocab_size() <= source.config().vocab_size, folder,
                    ": the tokenizer knows ", tokenizer.vocab_size(),
                    " ids, the model's vocabulary is ", source.config().vocab_size);
  LoadedModel loaded{.folder = folder,
                     .numerics = numerics,
                     .model = checkpoint::load_model(source, numerics),
                     .tokenizer = std::move(tokenizer),
                     .defaults = engine::load_generation_defaults(folder),
                     .effort = choose_effort_levels(folder, source.config(), "")};
  drop_file_pages();  // what the start needed once, the files of packed weights among it
  return loaded;
}

ops::SamplingParams sampling_params(const engine::Sampling& sampling) {
  return {.temperature = sampling.temperature,
          .top_p = sampling.top_p,
          .seed = sampling.seed,
          .top_k = sampling.top_k,
          .min_p = sampling.min_p,
          .repetition_penalty = sampling.repetition_penalty,
          .presence_penalty = sampling.presence_penalty,
          .frequency_penalty = sampling.frequency_penalty,
          .logit_bias = sampling.logit_bias};
}

Sequence::Sequence(const LoadedModel& loaded)
    : loaded_(loaded),
      kv_(loaded.config(),
          1,
          loaded.config().max_position_embeddings,
          loaded.numerics == ops::Numerics::kIdeal ? at::kFloat : at::kBFloat16,
          at::kCPU,
          kSlack) {}

bool Sequence::append(const std::vector<int64_t>& ids, const StopFunction& stop) {
  HADAL_INPUT_CHECK(
      length() + static_cast<int64_t>(ids.size()) <= loaded_.config().max_position_embeddings,
      "the text has ", length() + static_cast<int64_t>(ids.size()),
      " tokens, the model's last position is ", loaded_.config().max_position_embeddings);
  const c10::InferenceMode inference;  // no gradients, and no way through autograd's dispatch
  for (auto begin = ids.begin(); begin != ids.end();) {
    if (begin != ids.begin() && stop && stop()) return false;
    const auto end = begin + std::min<int64_t>(kChunk, ids.end() - begin);
    const ops::Batch batch = kv_.begin({0}, {end - begin});
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = loaded_.numerics;
    context.kv = &kv_;
    const at::Tensor streams =
        loaded_.model.forward(at::tensor(std::vector<int64_t>(begin, end), at::kLong), context);
    kv_.advance();
    tokens_.insert(tokens_.end(), begin, end);
    begin = end;
    if (begin != ids.end()) continue;
    const at::Tensor last = streams.narrow(0, streams.size(0) - 1, 1);
    logits_ =
        loaded_.model.logits(loaded_.model.head_input(last, loaded_.numerics), loaded_.numerics)[0]
            .contiguous();
  }
  return true;
}

void Sequence::set_tokens(const std::vector<int64_t>& ids) {
  HADAL_CHECK(!ids.empty(), "sequence: no tokens");
  int64_t common =
      std::mismatch(tokens_.begin(), tokens_.end(), ids.begin(), ids.end()).first - tokens_.begin();
  // The last token is always computed: its logits are wanted.
  common = std::min(common, static_cast<int64_t>(ids.size()) - 1);
  if (common < kv_.rollback_floor(0)) {
    reset();
  } else {
    kv_.rollback(0, common);
    tokens_.resize(static_cast<size_t>(common));
  }
  append(std::vector<int64_t>(ids.begin() + length(), ids.end()));
}

void Sequence::reset() {
  kv_.reset(0);
  tokens_.clear();
}

const char* finish_name(Finish finish) {
  switch (finish) {
    case Finish::kStop:
      return "stop";
    case Finish::kLength:
      return "length";
    case Finish::kInterrupted:
      return "interrupted";
  }
  return "unknown";
}

Finish decode(const LoadedModel& loaded,
              Sequence& sequence,
              const ops::SamplingParams& sampling,
              int64_t max_tokens,
              const std::function<bool(int64_t token)>& on_token,
              const StopFunction& stop) {
  const model::ModelConfig& config = loaded.config();
  ops::TokenHistory history;
  const bool adjusts = ops::adjusts_logits(sampling);
  if (adjusts) history.add_prompt(sequence.tokens());
  std::vector<float> adjusted;
  for (int64_t count = 0; count < max_tokens; ++count) {
    if (stop && stop()) return Finish::kInterrupted;
    // Ids beyond the tokenizer's have no text, so they are never chosen.
    std::span<const float> row(sequence.logits().const_data_ptr<float>(),
                               static_cast<size_t>(loaded.tokenizer.vocab_size()));
    if (adjusts) {
      adjusted.assign(row.begin(), row.end());
      ops::adjust_logits(adjusted, sampling, history, {});
      row = adjusted;
    }
    const int64_t token = ops::sample_token(row, sampling, sequence.length());
    if (adjusts) history.add(token);
    if (!on_token(token) || token == config.eos_token_id) return Finish::kStop;
    if (count + 1 == max_tokens || sequence.length() >= config.max_position_embeddings) break;
    sequence.append({token});
  }
  return Finish::kLength;
}

}  // namespace hadal::apps
