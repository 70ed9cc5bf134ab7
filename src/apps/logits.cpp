// hadal logits: token ids in, logits of every position out.
#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "apps/flags.h"
#include "apps/model_folder.h"
#include "base/check.h"
#include "base/math.h"
#include "checkpoint/load_model.h"
#include "engine/kv_cache.h"
#include "engine/model_runner.h"
#include "engine/sampler.h"
#include "ops/sm90.h"

namespace hadal::apps {
namespace {

struct LogitsFlags {
  std::string model, ids, out, numerics, device = "cpu", as;
  int64_t chunk = 0;
};

/// Token ids [batch, tokens] of a file, all of them in the vocabulary.
at::Tensor read_ids(const std::string& file, int64_t vocab_size) {
  const at::Tensor ids = checkpoint::TensorReader::open(file).tensor("input_ids").to(at::kLong);
  HADAL_INPUT_CHECK(ids.dim() == 2 && ids.numel() > 0, file, ": input_ids is ", ids.sizes(),
                    ", expected [batch, tokens]");
  HADAL_INPUT_CHECK((ids >= 0).all().item<bool>() && (ids < vocab_size).all().item<bool>(), file,
                    ": input_ids name tokens outside the vocabulary of ", vocab_size);
  return ids.contiguous();
}

/// Where the matrices go: what a card would hold, on the CPU, for --as.
checkpoint::LoadTarget target_of(const LogitsFlags& flags, ops::Numerics numerics) {
  const bool cuda = flags.device == "cuda";
  HADAL_INPUT_CHECK(!cuda || at::globalContext().hasCUDA(),
                    "--device cuda: this build or machine has no CUDA device");
  if (flags.as.empty()) return checkpoint::serving_target(cuda ? at::kCUDA : at::kCPU);
  HADAL_INPUT_CHECK(!cuda, "--as hopper: for the CPU; --device cuda is the card itself");
  HADAL_INPUT_CHECK(numerics != ops::Numerics::kIdeal,
                    "--as hopper: `ideal` runs references on a card, whose bits no CPU can say; "
                    "--numerics released or bf16");
  return {.held = checkpoint::Held::kAccelerator, .device = at::kCPU};
}

int run(const LogitsFlags& flags) {
  at::set_num_threads(1);  // hadal's kernels have their own threads
  const auto source = checkpoint::OfficialCheckpoint::open(model_folder(flags.model));
  const ops::Numerics numerics = flags.numerics.empty() ? checkpoint::default_numerics(source)
                                                        : ops::parse_numerics(flags.numerics);
  const checkpoint::LoadTarget target = target_of(flags, numerics);
  const model::Transformer model = checkpoint::load_model(source, numerics, target);
  const at::Tensor ids = read_ids(flags.ids, model.config().vocab_size);
  std::optional<ops::AsHopperGuard> as_hopper;
  if (!flags.as.empty()) as_hopper.emplace();
  const int64_t batch_size = ids.size(0), tokens = ids.size(1);
  const int64_t chunk = flags.chunk > 0 ? flags.chunk : tokens;
  at::Tensor logits = at::empty({batch_size, tokens, model.config().vocab_size}, at::kFloat);
  const int64_t page_tokens = engine::page_tokens_of(model.config()),
                pages = ceil_div(tokens, page_tokens);
  engine::KvCache cache(model.config(), {.numerics = numerics,
                                         .num_pages = batch_size * pages,
                                         .num_slots = batch_size,
                                         .device = target.device,
                                         .lazy = target.device.is_cpu()});
  engine::ModelSampler sampler(model.config().vocab_size);  // nothing is drawn
  engine::ModelRunner runner(model, cache, sampler);
  std::vector<int64_t> all_pages(static_cast<size_t>(batch_size * pages));
  std::iota(all_pages.begin(), all_pages.end(), int64_t{0});
  for (int64_t pos = 0; pos < tokens; pos += chunk) {
    const int64_t count = std::min(chunk, tokens - pos);
    std::vector<engine_core::SequenceStep> steps;
    for (int64_t slot = 0; slot < batch_size; ++slot) {
      steps.push_back({.slot = slot,
                       .start = pos,
                       .tokens = {ids.const_data_ptr<int64_t>() + slot * tokens + pos,
                                  static_cast<size_t>(count)},
                       .pages = std::span<const int64_t>(all_pages).subspan(
                           static_cast<size_t>(slot * pages), static_cast<size_t>(pages)),
                       .num_logits = count,
                       .shows_logits = true});
    }
    runner.run(steps);
    for (int64_t slot = 0; slot < batch_size; ++slot) {
      for (int64_t token = 0; token < count; ++token) {
        std::ranges::copy(runner.logits(slot, token),
                          logits[slot][pos + token].mutable_data_ptr<float>());
      }
    }
  }
  checkpoint::write_safetensors(flags.out, {{.name = "logits", .tensor = logits}});
  return 0;
}

}  // namespace

std::function<int()> define_logits(CLI::App& app) {
  auto flags = std::make_shared<LogitsFlags>();
  app.add_option("--model", flags->model, "checkpoint folder; default: the shipped model");
  app.add_option("--ids", flags->ids, "safetensors file with input_ids [batch, tokens] I32")
      ->required();
  app.add_option("--out", flags->out,
                 "safetensors file to write: logits [batch, tokens, vocab] F32")
      ->required();
  app.add_option("--numerics", flags->numerics,
                 "ideal, bf16, released or fp8; default: by the checkpoint's storage");
  app.add_option("--device", flags->device, "cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option(
         "--as", flags->as,
         "hopper: on the CPU, the bits that --device cuda gives on an H200; refused by name "
         "where a card leaves the kernels of hadal (docs/kernels.md)")
      ->check(CLI::IsMember({"hopper"}));
  app.add_option("--chunk", flags->chunk, "tokens a step; default: all at once")->check(above(0));
  return [flags] { return run(*flags); };
}

}  // namespace hadal::apps
