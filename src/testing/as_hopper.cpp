#include "testing/as_hopper.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <random>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include "base/check.h"
#include "base/math.h"
#include "engine/kv_cache.h"
#include "model/init.h"
#include "ops/sm90.h"
#include "testing/tiny_model.h"

namespace hadal::testing {
namespace {

using ops::Numerics;

/// Keeps values with names of their step and block.
class Trace {
 public:
  explicit Trace(TracedPass& pass) : pass_(pass) {}

  void step(int64_t pos, int64_t count) {
    where_ = concat("tokens ", pos, " to ", pos + count - 1);
  }
  void keep(const std::string& name, const at::Tensor& value) {
    if (value.defined()) pass_.values.emplace_back(concat(where_, ", ", name), value.cpu());
  }
  void block(int64_t index, const model::BlockOutput& out) {
    const auto name = [&](const char* what) { return concat("block ", index, ", ", what); };
    const model::AttentionAux& attn = out.aux.attn;
    keep(name("queries"), attn.seen.q);
    keep(name("chosen blocks"), attn.selection);
    keep(name("affinities"), out.aux.moe.routing.affinity);
    keep(name("experts"), out.aux.moe.routing.experts);
    keep(name("weights of experts"), out.aux.moe.routing.weights);
    keep(name("streams"), out.streams);
  }

 private:
  TracedPass& pass_;
  std::string where_;
};

std::vector<model::BlockChoices> on_device(std::vector<model::BlockChoices> choices,
                                           at::Device device) {
  for (model::BlockChoices& block : choices) {
    if (block.experts.defined()) block.experts = block.experts.to(device);
    if (block.selection.defined()) block.selection = block.selection.to(device);
  }
  return choices;
}

at::Tensor bits_of(const at::Tensor& x) {
  const at::Tensor dense = x.contiguous();
  switch (dense.element_size()) {
    case 2:
      return dense.view(at::kShort);
    case 4:
      return dense.view(at::kInt);
    default:
      return dense;
  }
}

}  // namespace

model::Transformer packed_model(const model::ModelConfig& config,
                                Numerics numerics,
                                uint64_t seed) {
  model::Transformer model(random_model(config, seed, at::kFloat));
  model.visit([&](model::Parameter& p) {
    const bool matrix = p.is_matrix() || p.kind == model::ParamKind::kHead;
    if (matrix || p.kind == model::ParamKind::kEmbedding)
      p.value = p.operand(numerics).to(at::kBFloat16).contiguous();
    if (!matrix) return;
    const ops::Weight dense(p.kind == model::ParamKind::kGroups
                                ? p.value.reshape({p.units, -1, p.value.size(-1)})
                                : p.value);
    const auto storage = numerics == Numerics::kReleased ? p.storage : model::Storage::kBf16;
    if (auto packed = dense.to_sm90(storage, p.role)) p.hold(std::move(*packed));
  });
  return model;
}

namespace {

/// Calls step(ids, context) with a context for every step of a sequence through the caches.
template <typename Step>
void each_step(const model::Transformer& model,
               Numerics numerics,
               std::span<const int64_t> tokens,
               int64_t chunk,
               RunsOn where,
               Step&& step) {
  const at::Device device = where == RunsOn::kCard ? at::Device(at::kCUDA) : at::Device(at::kCPU);
  std::optional<ops::AsHopperGuard> guard;
  if (where == RunsOn::kAsHopper) guard.emplace();
  const c10::InferenceMode inference;
  const auto count = std::ssize(tokens);
  const int64_t num_pages = ceil_div(count, engine::page_tokens_of(model.config()));
  engine::KvCache cache(
      model.config(),
      {.numerics = numerics, .num_pages = num_pages + 1, .num_slots = 2, .device = device});
  std::vector<int64_t> pages(static_cast<size_t>(num_pages));
  std::iota(pages.rbegin(), pages.rend(), 0);
  for (int64_t pos = 0; pos < count; pos += chunk) {
    const auto part =
        tokens.subspan(static_cast<size_t>(pos), static_cast<size_t>(std::min(chunk, count - pos)));
    const engine_core::SequenceStep planned{
        .slot = 1, .start = pos, .tokens = part, .pages = pages};
    const ops::Batch batch = cache.begin({&planned, 1});
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = numerics;
    context.kv = &cache;
    step(at::tensor(std::vector<int64_t>(part.begin(), part.end()), at::kLong).to(device), context);
  }
}

}  // namespace

TracedPass traced_pass(const model::Transformer& model,
                       Numerics numerics,
                       std::span<const int64_t> tokens,
                       int64_t chunk,
                       RunsOn where,
                       const std::vector<model::BlockChoices>& forced) {
  TracedPass pass;
  Trace trace(pass);
  std::vector<at::Tensor> logits;
  const auto step = [&](const at::Tensor& ids, model::ForwardContext& context) {
    context.request = {.experts = true, .routing = true, .selection = true, .attention = true};
    context.forced = on_device(forced, ids.device());
    trace.step(context.batch->start(0), ids.size(0));
    at::Tensor streams = model.embed(ids, numerics);
    pass.choices.clear();
    for (int64_t layer = 0; layer < model.config().n_layers; ++layer) {
      model::BlockOutput out = model.run_layer(layer, std::move(streams), ids, context);
      trace.block(layer, out);
      pass.choices.push_back(model::choices_of(out.aux, model.config(), layer, *context.batch));
      streams = std::move(out.streams);
    }
    const at::Tensor head = model.head_input(streams, numerics);
    trace.keep("input of the head", head);
    logits.push_back(model.logits(head, numerics).cpu());
    trace.keep("logits", logits.back());
  };
  each_step(model, numerics, tokens, chunk, where, step);
  pass.logits = at::cat(logits);
  return pass;
}

at::Tensor plain_logits(const model::Transformer& model,
                        Numerics numerics,
                        std::span<const int64_t> tokens,
                        int64_t chunk,
                        RunsOn where) {
  std::vector<at::Tensor> logits;
  const auto step = [&](const at::Tensor& ids, model::ForwardContext& context) {
    const at::Tensor streams = model.forward(ids, context).streams;
    logits.push_back(model.logits(model.head_input(streams, numerics), numerics).cpu());
  };
  each_step(model, numerics, tokens, chunk, where, step);
  return at::cat(logits);
}

std::string first_difference(const TracedPass& found, const TracedPass& wanted) {
  if (found.values.size() != wanted.values.size())
    return concat(found.values.size(), " values instead of ", wanted.values.size());
  for (size_t i = 0; i < wanted.values.size(); ++i) {
    const auto& [name, value] = wanted.values[i];
    const auto& [other_name, other] = found.values[i];
    if (other_name != name) return concat(other_name, " instead of ", name);
    if (other.sizes() != value.sizes() || other.scalar_type() != value.scalar_type())
      return concat(name, ": ", other.sizes(), " instead of ", value.sizes());
    const at::Tensor apart = bits_of(other).ne(bits_of(value));
    if (!apart.any().item<bool>()) continue;
    const at::Tensor places = apart.nonzero();
    std::string first;
    for (int64_t d = 0; d < places.size(1); ++d)
      first += concat(d > 0 ? ", " : "", places[0][d].item<int64_t>());
    return concat(name, ": ", places.size(0), " of ", value.numel(), " differ, the first [", first,
                  "]: ", other.masked_select(apart)[0].item<double>(), " instead of ",
                  value.masked_select(apart)[0].item<double>());
  }
  return "";
}

std::vector<int64_t> random_tokens(int64_t count, int64_t vocab_size, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int64_t> tokens(static_cast<size_t>(count));
  for (int64_t& id : tokens)
    id = static_cast<int64_t>(random() % static_cast<unsigned>(vocab_size));
  return tokens;
}

}  // namespace hadal::testing
