#include "train/objective.h"

#include <cmath>
#include <optional>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include "base/check.h"
#include "ops/indexer/index_kl.h"
#include "ops/loss/cross_entropy.h"
#include "ops/moe/balance.h"

namespace hadal::train {
namespace {

at::Tensor upload(const std::vector<int64_t>& values, at::Device device) {
  return at::tensor(values, at::kLong).to(device);
}

void add_to(at::Tensor& sum, const at::Tensor& value) { sum = sum.defined() ? sum + value : value; }

/// What holds for all members of a group that shares a row.
class Whole {
 public:
  explicit Whole(const PartPass* pass) : part_(pass != nullptr ? pass->part : nullptr) {}
  /// A sum over the whole row, of this pass's.
  at::Tensor sum(const at::Tensor& own) const {
    return part_ != nullptr ? part_->sum(own) : own.detach();
  }
  int64_t row_length(int64_t own) const { return part_ != nullptr ? part_->row_length() : own; }

 private:
  const model::RowPart* part_;
};

/// sum_i f_i P_i of each row, averaged over rows: f counts choices, P averages normalised
/// affinities. `load` counts the whole row's choices.
at::Tensor balance_loss(const ops::Routing& routing,
                        const at::Tensor& load,
                        int64_t rows,
                        int64_t topk,
                        const Whole& whole) {
  const int64_t experts = routing.affinity.size(1);
  const at::Tensor normalised = routing.affinity / routing.affinity.sum(1, /*keepdim=*/true);
  if (rows == 1 && ops::use_cpu_kernel(normalised))
    return ops::balance_loss(normalised, whole.sum(ops::share_sums(normalised)), load,
                             whole.row_length(normalised.size(0)), topk);
  const at::Tensor share = normalised.reshape({rows, -1, experts});
  const int64_t row_length = share.size(1);
  const at::Tensor chosen = (routing.experts.reshape({rows, row_length * topk, 1}) ==
                             at::arange(experts, routing.experts.options()))
                                .sum(1)
                                .to(share.scalar_type());
  const at::Tensor f =
      chosen * (static_cast<double>(experts) / static_cast<double>(topk * row_length));
  return (f * share.mean(1)).sum(1).mean();
}

at::Tensor count_clamped(const model::SwigluInput& input, double limit) {
  return at::stack({(input.gate > limit).sum(), (input.up > limit).sum(), (input.up < -limit).sum(),
                    at::full({}, input.gate.numel(), input.gate.options().dtype(at::kLong))});
}

/// Sums of the auxiliary terms over the blocks of a pass, with their gradients; undefined where no
/// block has one.
struct AuxiliaryTerms {
  Whole whole;
  at::Tensor balance, index;
  at::Tensor index_sum;  ///< the value of `index` over whole rows, without gradients

  void add(int64_t block,
           const model::BlockAux& aux,
           const model::ModelConfig& config,
           int64_t rows,
           const StepCounts& counts,
           StepMeasures& measures) {
    if (!config.is_hashed(block)) {
      const ops::Routing& routing = aux.moe.routing;
      const at::Tensor all = at::arange(config.n_routed_experts, routing.experts.options());
      const at::Tensor load = whole.sum((routing.experts.flatten().unsqueeze(1) == all).sum(0));
      add_to(measures.expert_load[static_cast<size_t>(block)], load);
      add_to(balance, balance_loss(routing, load, rows, config.n_activated_experts, whole));
    }
    if (aux.attn.index_loss.sum.defined()) {
      const int64_t queries = counts.index_queries[static_cast<size_t>(block)];
      if (queries > 0) {
        add_to(index, aux.attn.index_loss.sum / static_cast<double>(queries));
        add_to(index_sum, whole.sum(aux.attn.index_loss.sum) / static_cast<double>(queries));
      }
    }
    for (const model::SwigluInput& input : aux.moe.swiglu)
      add_to(measures.clamped, count_clamped(input, config.swiglu_limit));
  }
};

}  // namespace

namespace {

/// The rows, each by itself.
std::vector<PackedRows> rows_of(const PackedRows& packed) {
  std::vector<PackedRows> result;
  size_t sample = 0;
  for (int64_t row = 0; row < packed.rows; ++row) {
    const auto begin = static_cast<std::ptrdiff_t>(row * packed.row_length),
               end = begin + static_cast<std::ptrdiff_t>(packed.row_length);
    PackedRows one{.rows = 1,
                   .row_length = packed.row_length,
                   .tokens = {packed.tokens.begin() + begin, packed.tokens.begin() + end},
                   .scored = {packed.scored.begin() + begin, packed.scored.begin() + end},
                   .sample_lengths = {}};
    for (int64_t left = packed.row_length; left > 0; ++sample) {
      one.sample_lengths.push_back(packed.sample_lengths.at(sample));
      left -= one.sample_lengths.back();
    }
    result.push_back(std::move(one));
  }
  return result;
}

}  // namespace

struct MicroBatch::Labels {
  std::vector<int64_t> ids, targets, next_ids, mtp_targets;
  int64_t num_targets = 0, num_mtp_targets = 0;

  explicit Labels(const PackedRows& rows) {
    HADAL_CHECK(rows.rows >= 1 && rows.row_length >= 1 &&
                    static_cast<int64_t>(rows.tokens.size()) == rows.rows * rows.row_length &&
                    rows.scored.size() == rows.tokens.size(),
                "micro_batch: ", rows.tokens.size(), " tokens and ", rows.scored.size(),
                " marks for ", rows.rows, " rows of ", rows.row_length);
    ids.assign(rows.tokens.begin(), rows.tokens.end());
    targets.assign(ids.size(), -1);
    next_ids.assign(ids.size(), 0);
    mtp_targets.assign(ids.size(), -1);
    size_t begin = 0;
    for (const int64_t length : rows.sample_lengths) {
      const size_t end = begin + static_cast<size_t>(length);
      HADAL_CHECK(length >= 1 && end <= ids.size() &&
                      begin / static_cast<size_t>(rows.row_length) ==
                          (end - 1) / static_cast<size_t>(rows.row_length),
                  "micro_batch: a sample of ", length, " tokens at ", begin, " crosses its row");
      for (size_t t = begin; t + 1 < end; ++t) {
        next_ids[t] = ids[t + 1];
        if (rows.scored[t + 1] != 0) {
          targets[t] = ids[t + 1];
          ++num_targets;
        }
        if (t + 2 < end && rows.scored[t + 2] != 0) {
          mtp_targets[t] = ids[t + 2];
          ++num_mtp_targets;
        }
      }
      begin = end;
    }
    HADAL_CHECK(begin == ids.size(), "micro_batch: samples cover ", begin, " of ", ids.size(),
                " tokens");
  }
};

MicroBatch::MicroBatch(const PackedRows& packed, at::Device device)
    : MicroBatch(packed, Labels(packed), device) {}

MicroBatch::MicroBatch(const PackedRows& packed, Labels labels, at::Device device)
    : batch(packed.sample_lengths, std::vector<int64_t>(packed.sample_lengths.size(), 0), device),
      rows(packed.rows),
      ids(upload(labels.ids, device)),
      targets(upload(labels.targets, device)),
      next_ids(upload(labels.next_ids, device)),
      mtp_targets(upload(labels.mtp_targets, device)),
      num_targets(labels.num_targets),
      num_mtp_targets(labels.num_mtp_targets) {
  if (!device.is_cpu() || rows == 1) return;
  for (const PackedRows& row : rows_of(packed)) each_row.emplace_back(row, device);
}

bool is_trained(const model::Parameter& parameter, const ObjectiveParams& params) {
  if (!parameter.trainable()) return false;
  if (parameter.name.find(".indexer.") != std::string::npos) return params.index_loss();
  if (parameter.name.rfind("mtp.", 0) == 0 && params.mtp_weight == 0.0) return false;
  return params.language_loss();
}

void StepCounts::add(const MicroBatch& micro, const model::ModelConfig& config) {
  targets += micro.num_targets;
  mtp_targets += micro.num_mtp_targets;
  rows += micro.rows;
  index_queries.resize(static_cast<size_t>(config.n_blocks()), 0);
  for (int64_t block = 0; block < config.n_blocks(); ++block) {
    if (config.kind(block) != model::LayerKind::kCsa) continue;
    for (int64_t seq = 0; seq < micro.batch.num_seqs(); ++seq) {
      const int64_t seen = micro.batch.length(seq) - (config.ratio(block) - 1);
      if (seen > 0) index_queries[static_cast<size_t>(block)] += seen;
    }
  }
}

MicroBatch MicroBatch::part(const model::RowPart& part) const {
  HADAL_CHECK(rows == 1 && ids.size(0) == part.row_length(), "micro_batch: a part of ",
              part.row_length(), " tokens of ", rows, " rows of ", ids.size(0), " tokens");
  MicroBatch result = *this;
  result.batch = part.batch();
  for (at::Tensor* each : {&result.ids, &result.targets, &result.next_ids, &result.mtp_targets})
    *each = each->narrow(0, part.begin(), part.end() - part.begin());
  return result;
}

namespace {

/// A leaf of the values that arrived from another stage.
at::Tensor leaf_of(const at::Tensor& values) {
  return values.defined() ? values.detach().requires_grad_(true) : values;
}

bool has_mtp_loss(const model::ModelConfig& config, const ObjectiveParams& params) {
  return config.n_mtp_layers > 0 && params.mtp_weight != 0.0;
}

/// Rows of the embedding that the MTP block reads.
at::Tensor mtp_embedding(const model::Transformer& model,
                         const MicroBatch& micro,
                         ops::Numerics numerics,
                         PartPass* part) {
  if (part == nullptr) return model.embedding_rows(micro.next_ids, numerics);
  part->mtp_embedding = leaf_of_parameter(model.embedding_master());
  return model.embedding_rows(micro.next_ids, numerics, part->mtp_embedding);
}

/// The losses behind the last main block: main and MTP.
at::Tensor language_losses(const model::Transformer& model,
                           const at::Tensor& streams,
                           const MicroBatch& micro,
                           const StepCounts& counts,
                           const ObjectiveParams& params,
                           const at::Tensor& mtp_rows,
                           PartPass* part,
                           model::ForwardContext& context,
                           AuxiliaryTerms& terms,
                           StepMeasures& measures) {
  const model::ModelConfig& config = model.config();
  const at::Tensor head = model.head_operand(params.numerics);
  // Of a part the whole row's sum is divided, as on one rank.
  const auto loss = [&](const at::Tensor& hidden, const at::Tensor& targets, int64_t count,
                        HeadUse* use, at::Tensor& measure) {
    const at::Tensor sum = token_loss(model, head, hidden, targets, use);
    const auto divisor = static_cast<double>(std::max<int64_t>(count, 1));
    add_to(measure, terms.whole.sum(sum) / divisor);
    return sum / divisor;
  };
  const at::Tensor main_loss =
      loss(model.head_input(streams, params.numerics), micro.targets, counts.targets,
           part != nullptr ? &part->head : nullptr, measures.main_loss);
  if (!has_mtp_loss(config, params)) return main_loss;
  const at::Tensor rows =
      mtp_rows.defined() ? mtp_rows : mtp_embedding(model, micro, params.numerics, part);
  const model::MtpOutput mtp = model.mtp(streams, micro.next_ids, rows, context);
  terms.add(config.n_layers, mtp.aux, config, micro.rows, counts, measures);
  return main_loss + loss(mtp.head_input, micro.mtp_targets, counts.mtp_targets,
                          part != nullptr ? &part->mtp_head : nullptr, measures.mtp_loss) *
                         params.mtp_weight;
}

}  // namespace

bool sends_mtp_rows(const model::ModelConfig& config, const ObjectiveParams& params) {
  return has_mtp_loss(config, params);
}

StagePass stage_forward(const model::Transformer& model,
                        const model::LayerRun& layers,
                        const MicroBatch& micro,
                        const StepCounts& counts,
                        const ObjectiveParams& params,
                        StageBorder in,
                        const at::Tensor& mtp_rows,
                        PartPass* part) {
  StagePass pass{.in = std::move(in), .out = {}, .mtp_rows = {}, .total = {}, .measures = {}};
  StepMeasures& measures = pass.measures;
  const model::ModelConfig& config = model.config();
  const double row_share = static_cast<double>(micro.rows) / static_cast<double>(counts.rows);
  measures.expert_load.resize(static_cast<size_t>(config.n_blocks()));
  model::ForwardContext context;
  context.batch = &micro.batch;
  context.part = part != nullptr ? part->part : nullptr;
  context.numerics = params.numerics;
  context.mode = params.mode;
  context.recompute = params.recompute;
  context.request = {
      .routing = true, .swiglu = params.count_clamps, .index_loss = params.index_loss()};
  std::optional<ops::Tape> tape;
  if (params.tape) tape.emplace(*params.tape);
  pass.in.streams = leaf_of(pass.in.streams);
  // Block by block, so that no more than one block's SwiGLU inputs are held for the counts. A
  // stage's sums go on where the one before ended, so that they are added in one order.
  AuxiliaryTerms terms{.whole = Whole(part),
                       .balance = pass.in.balance,
                       .index = pass.in.index,
                       .index_sum = pass.in.index};
  at::Tensor streams = layers.first ? model.embed(micro.ids, params.numerics) : pass.in.streams;
  for (int64_t layer = layers.begin; layer < layers.end; ++layer) {
    model::BlockOutput block = model.run_layer(layer, std::move(streams), micro.ids, context);
    terms.add(layer, block.aux, config, micro.rows, counts, measures);
    streams = std::move(block.streams);
  }
  if (layers.last) {
    pass.mtp_rows = leaf_of(mtp_rows);
    pass.total = language_losses(model, streams, micro, counts, params, pass.mtp_rows, part,
                                 context, terms, measures);
  } else {
    if (layers.first && has_mtp_loss(config, params))
      pass.mtp_rows = mtp_embedding(model, micro, params.numerics, part);
    pass.out = {.streams = std::move(streams), .balance = {}, .index = {}};
    if (terms.balance.defined()) pass.out.balance = terms.balance.detach();
    pass.out.index = terms.index_sum;
  }
  if (terms.balance.defined() && params.balance_weight != 0.0) {
    add_to(pass.total, terms.balance * (params.balance_weight * row_share));
    if (layers.last) add_to(measures.balance_loss, terms.balance.detach() * row_share);
  }
  if (!params.language_loss() && pass.total.defined()) pass.total = pass.total.detach();
  if (terms.index.defined()) {
    add_to(pass.total, terms.index * params.index_weight);
    if (layers.last) add_to(measures.index_loss, terms.index_sum);
  }
  if (part != nullptr && measures.clamped.defined())
    measures.clamped = terms.whole.sum(measures.clamped);
  if (tape) tape->close();
  return pass;
}

void stage_backward(StagePass& pass,
                    const at::Tensor& grad_streams,
                    const at::Tensor& grad_mtp_rows) {
  torch::autograd::variable_list roots, grads;
  const auto add = [&](const at::Tensor& root, const at::Tensor& grad) {
    if (!root.requires_grad()) return;
    roots.push_back(root);
    grads.push_back(grad);
  };
  if (grad_streams.defined()) add(pass.out.streams, grad_streams);
  if (grad_mtp_rows.defined()) add(pass.mtp_rows, grad_mtp_rows);
  if (pass.total.defined()) add(pass.total, at::ones_like(pass.total));
  if (!roots.empty()) torch::autograd::backward(roots, grads);
  pass.out.streams.reset();
  pass.total.reset();
}

namespace {

/// One pass: gradients go to the parameters.
StepMeasures run_pass(const model::Transformer& model,
                      const MicroBatch& micro,
                      const StepCounts& counts,
                      const ObjectiveParams& params) {
  StagePass pass = stage_forward(model, model::all_layers(model.config()), micro, counts, params);
  stage_backward(pass);
  return std::move(pass.measures);
}

}  // namespace

void accumulate(const model::Transformer& model,
                const MicroBatch& micro,
                const StepCounts& counts,
                const ObjectiveParams& params,
                StepSums& sums) {
  if (micro.each_row.empty()) sums.add(run_pass(model, micro, counts, params));
  for (const MicroBatch& row : micro.each_row) accumulate(model, row, counts, params, sums);
}

void accumulate(const model::Transformer& model,
                const MicroBatch& micro,
                const StepCounts& counts,
                const ObjectiveParams& params,
                StepMeasures& measures) {
  StepSums sums(model);
  accumulate(model, micro, counts, params, sums);
  measures = sums.finish();
}

void evaluate(const model::Transformer& model,
              const MicroBatch& micro,
              model::AttentionMode mode,
              ops::Numerics numerics,
              Evaluation& result) {
  if (!micro.each_row.empty()) {
    for (const MicroBatch& row : micro.each_row) evaluate(model, row, mode, numerics, result);
    return;
  }
  EvaluationBorder border;
  evaluate_stage(model, model::all_layers(model.config()), micro, mode, numerics, border, result);
}

void evaluate_stage(const model::Transformer& model,
                    const model::LayerRun& layers,
                    const MicroBatch& micro,
                    model::AttentionMode mode,
                    ops::Numerics numerics,
                    EvaluationBorder& border,
                    Evaluation& result) {
  const at::NoGradGuard no_grad;
  const model::ModelConfig& config = model.config();
  const double scale = std::pow(static_cast<double>(config.head_dim), -0.5);
  model::ForwardContext context;
  context.batch = &micro.batch;
  context.numerics = numerics;
  context.mode = mode;
  context.request = {.selection = true, .attention = true};
  at::Tensor streams = layers.first ? model.embed(micro.ids, numerics) : std::move(border.streams);
  for (int64_t layer = layers.begin; layer < layers.end; ++layer) {
    model::BlockOutput block = model.run_layer(layer, std::move(streams), micro.ids, context);
    streams = std::move(block.streams);
    const auto& [q, blocks, lse] = block.aux.attn.seen;
    if (!block.aux.attn.selection.defined()) continue;
    const ops::KeptMass kept = ops::selected_mass(block.aux.attn.selection, q, blocks, lse,
                                                  micro.batch, config.ratio(layer), scale);
    add_to(border.mass, kept.sum);
    add_to(border.best, kept.best);
    border.mass_queries += kept.num_queries;
  }
  if (!layers.last) {
    border.streams = std::move(streams);
    return;
  }
  result.loss_sum += ops::linear_cross_entropy(model.head_input(streams, numerics),
                                               model.head_operand(numerics), micro.targets)
                         .item<double>();
  result.targets += micro.num_targets;
  result.mass_queries += border.mass_queries;
  if (!border.mass.defined()) return;
  result.mass_sum += border.mass.item<double>();
  result.best_mass_sum += border.best.item<double>();
}

void update_router_bias(model::Transformer& model, const StepMeasures& measures, double speed) {
  const at::NoGradGuard no_grad;
  int64_t block = 0;
  model.visit([&](model::Parameter& parameter) {
    if (parameter.kind != model::ParamKind::kGateBias) return;
    // Biases are visited in block order; hashed blocks have none.
    while (model.config().is_hashed(block)) ++block;
    const at::Tensor& load = measures.expert_load[static_cast<size_t>(block++)];
    if (!load.defined() || parameter.elsewhere) return;
    const at::Tensor counts = load.to(parameter.value.scalar_type());
    parameter.value.add_(at::sign(counts.mean() - counts) * speed);
  });
}

}  // namespace hadal::train
