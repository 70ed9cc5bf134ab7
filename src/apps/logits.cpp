// hadal logits: token ids in, logits of every position out.
#include <memory>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "apps/flags.h"
#include "apps/model_folder.h"
#include "base/check.h"
#include "checkpoint/load_model.h"
#include "model/contiguous_kv.h"

namespace hadal::apps {
namespace {

struct Flags {
  std::string model, ids, out, numerics;
  int64_t chunk = 0;
};

int run(const Flags& flags) {
  at::set_num_threads(1);  // hadal's kernels have their own threads
  const auto source = checkpoint::OfficialCheckpoint::open(model_folder(flags.model));
  const ops::Numerics numerics = flags.numerics.empty() ? checkpoint::default_numerics(source)
                                                        : ops::parse_numerics(flags.numerics);
  const model::Transformer model = checkpoint::load_model(source, numerics);
  const at::Tensor ids =
      checkpoint::TensorReader::open(flags.ids).tensor("input_ids").to(at::kLong);
  HADAL_INPUT_CHECK(ids.dim() == 2 && ids.numel() > 0, flags.ids, ": input_ids is ", ids.sizes(),
                    ", expected [batch, tokens]");
  HADAL_INPUT_CHECK(
      (ids >= 0).all().item<bool>() && (ids < model.config().vocab_size).all().item<bool>(),
      flags.ids, ": input_ids name tokens outside the vocabulary of ", model.config().vocab_size);
  const int64_t batch_size = ids.size(0), tokens = ids.size(1);
  const int64_t chunk = flags.chunk > 0 ? flags.chunk : tokens;
  const at::NoGradGuard no_grad;
  const at::ScalarType type = numerics == ops::Numerics::kIdeal ? at::kFloat : at::kBFloat16;
  model::ContiguousKv kv(model.config(), batch_size, tokens, type, at::kCPU);
  std::vector<int64_t> slots;
  for (int64_t slot = 0; slot < batch_size; ++slot) slots.push_back(slot);
  at::Tensor logits = at::empty({batch_size, tokens, model.config().vocab_size}, at::kFloat);
  for (int64_t pos = 0; pos < tokens; pos += chunk) {
    const int64_t count = std::min(chunk, tokens - pos);
    const ops::Batch batch = kv.begin(slots, std::vector<int64_t>(slots.size(), count));
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = numerics;
    context.kv = &kv;
    const at::Tensor streams = model.forward(ids.narrow(1, pos, count).flatten(), context).streams;
    logits.narrow(1, pos, count)
        .copy_(model.logits(model.head_input(streams, numerics), numerics)
                   .reshape({batch_size, count, -1}));
    kv.advance();
  }
  checkpoint::write_safetensors(flags.out, {{.name = "logits", .tensor = logits}});
  return 0;
}

}  // namespace

std::function<int()> define_logits(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  app.add_option("--model", flags->model, "checkpoint folder; default: the shipped model");
  app.add_option("--ids", flags->ids, "safetensors file with input_ids [batch, tokens] I32")
      ->required();
  app.add_option("--out", flags->out,
                 "safetensors file to write: logits [batch, tokens, vocab] F32")
      ->required();
  app.add_option("--numerics", flags->numerics,
                 "ideal, bf16 or released; default: by the checkpoint's scales");
  app.add_option("--chunk", flags->chunk, "tokens a step; default: all at once")->check(above(0));
  return [flags] { return run(*flags); };
}

}  // namespace hadal::apps
