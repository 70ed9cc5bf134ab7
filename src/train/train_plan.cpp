#include "train/train_plan.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <numeric>

#include "base/check.h"
#include "model/cost.h"
#include "model/describe.h"
#include "ops/optim/newton_schulz_cpu.h"
#include "train/step_share.h"

namespace hadal::train {
namespace {

using model::Field;

double d(int64_t value) { return static_cast<double>(value); }

int64_t product(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

std::vector<Field> fields_of(const model::ModelConfig& config) {
  struct Collect final : model::FieldVisitor {
    std::vector<Field> fields;
    void field(model::Parameter&, const Field& field) override { fields.push_back(field); }
  } visitor;
  model::ModelParameters parameters;
  describe(config, parameters, visitor);
  return std::move(visitor.fields);
}

/// Ten steps of X <- a X + (b G + c G^2) X with G = X X^T, on the smaller side.
double newton_schulz_flops(const std::vector<int64_t>& matrix) {
  const double m = d(std::min(matrix[0], matrix[1])), n = d(std::max(matrix[0], matrix[1]));
  return ops::kSchulzSteps * (2 * m * m * n + 2 * m * m * m + 2 * m * m * n);
}

PlannedParameter planned(const Field& field) {
  PlannedParameter result{
      .name = field.name, .rule = update_rule(field.kind), .shape = field.shape, .unit_shape = {}};
  const int64_t elements = product(field.shape);
  if (result.rule == UpdateRule::kNone) return result;
  if (result.rule == UpdateRule::kMuon) {
    const int64_t columns = field.shape.back();
    result.units = field.units;
    result.unit_shape = {elements / columns / field.units, columns};
  } else {
    result.units = elements;
    result.unit_shape = {1};
  }
  return result;
}

class Maker {
 public:
  Maker(const model::ModelConfig& config, const TrainPlanParams& params)
      : config_(config), params_(params), fields_(fields_of(config)) {
    HADAL_INPUT_CHECK(params.row_length > 0 && params.step_tokens >= params.row_length,
                      "plan: a step of ", params.step_tokens, " tokens has no row of ",
                      params.row_length);
  }

  TrainPlan make() {
    parameters();
    rows();
    memory();
    traffic();
    time();
    return std::move(plan_);
  }

 private:
  size_t num_ranks() const { return static_cast<size_t>(params_.ranks); }
  static double most(const std::vector<double>& values) {
    return *std::max_element(values.begin(), values.end());
  }

  void parameters() {
    std::vector<PlanItem> items;
    for (const Field& field : fields_) {
      plan_.parameters.push_back(planned(field));
      if (plan_.parameters.back().rule == UpdateRule::kNone) continue;
      places_.push_back(plan_.parameters.size() - 1);
      items.push_back(plan_item(field.name, field.kind, field.shape, field.units));
      plan_.elements += d(items.back().elements);
    }
    const int64_t cap = params_.cap > 0 ? params_.cap : dense_cap(items);
    plan_.zero = plan_zero(items, params_.ranks, cap);
    for (const PlanPiece& piece : plan_.zero.pieces) {
      PlannedParameter& parameter = plan_.parameters[places_[piece.item]];
      if (parameter.pieces++ == 0) parameter.first_owner = parameter.last_owner = piece.owner;
      parameter.first_owner = std::min(parameter.first_owner, piece.owner);
      parameter.last_owner = std::max(parameter.last_owner, piece.owner);
    }
  }

  void rows() {
    plan_.rows = params_.step_tokens / params_.row_length;
    plan_.rows_of_rank = row_share(plan_.rows, params_.ranks, 0).size();
    plan_.gradient_sets = std::bit_width(static_cast<uint64_t>(plan_.rows_of_rank));
  }

  bool rounded(const Field& field) const {
    return params_.ranks > 1 && is_rounded(field.kind, field.storage, params_.numerics);
  }
  const Field& field_of(const PlanPiece& piece) const { return fields_[places_[piece.item]]; }

  void memory() {
    for (const Field& field : fields_) {
      const double bytes = field.kind == model::ParamKind::kHashTable ? 8 : rounded(field) ? 2 : 4;
      plan_.fullest.weights += bytes * d(product(field.shape));
    }
    std::vector<double> masters(num_ranks(), 0.0), moments = masters, copies = masters;
    owned_ = masters;
    for (const PlanPiece& piece : plan_.zero.pieces) {
      const auto owner = static_cast<size_t>(piece.owner);
      const Field& field = field_of(piece);
      owned_[owner] += d(piece.size());
      if (rounded(field)) masters[owner] += 4 * d(piece.size());
      moments[owner] += d(state_bytes(update_rule(field.kind)) - 4) * d(piece.size());
      copies[owner] += d(state_bytes(update_rule(field.kind))) * d(piece.size());
    }
    RankMemory& memory = plan_.fullest;
    memory.masters = most(masters);
    memory.moments = most(moments);
    if (params_.copied_checkpoints) memory.checkpoint = most(copies);
    for (const Field& field : fields_) {  // moved by no gradient: every rank has it
      if (!params_.copied_checkpoints || update_rule(field.kind) != UpdateRule::kNone) continue;
      memory.checkpoint +=
          (field.kind == model::ParamKind::kHashTable ? 8 : 4) * d(product(field.shape));
    }
    memory.gradients = 4 * plan_.elements * d(plan_.gradient_sets);
    if (params_.ranks > 1) memory.gradients += 4 * most(owned_);
    const double bytes = params_.numerics == ops::Numerics::kIdeal ? 4 : 2;
    memory.activations =
        bytes * d(params_.row_length * config_.hc_mult * config_.dim) * d(config_.n_blocks());
  }

  void traffic() {
    if (params_.ranks == 1) return;
    std::vector<double> nodes(num_ranks(), 0.0), values(num_ranks(), 0.0);
    for (size_t r = 0; r < nodes.size(); ++r)
      nodes[r] = d(std::ssize(
          nodes_of(row_share(plan_.rows, params_.ranks, static_cast<int64_t>(r)), plan_.rows)));
    const double all_nodes = std::accumulate(nodes.begin(), nodes.end(), 0.0);
    double all_values = 0.0;
    for (const PlanPiece& piece : plan_.zero.pieces) {
      const double bytes = (rounded(field_of(piece)) ? 2 : 4) * d(piece.size());
      values[static_cast<size_t>(piece.owner)] += bytes;
      all_values += bytes;
    }
    for (size_t r = 0; r < nodes.size(); ++r) {
      const double sent = 4 * nodes[r] * (plan_.elements - owned_[r]);
      const double received = 4 * (all_nodes - nodes[r]) * owned_[r];
      plan_.gradients_sent = std::max(plan_.gradients_sent, sent);
      plan_.gradients_received = std::max(plan_.gradients_received, received);
      plan_.values_received = std::max(plan_.values_received, all_values - values[r]);
    }
  }

  void time() {
    // A token sees half of its row on average; a backward pass costs two forward ones.
    const double token =
        model::decode_cost(config_, std::max<int64_t>(1, params_.row_length / 2)).raw_flops();
    plan_.pass_flops = 3 * token * d(plan_.rows_of_rank * params_.row_length);
    std::vector<double> schulz(num_ranks(), 0.0);
    for (const PlanPiece& piece : plan_.zero.pieces) {
      const PlannedParameter& parameter = plan_.parameters[places_[piece.item]];
      if (parameter.rule != UpdateRule::kMuon) continue;
      const double units = d(piece.size()) / d(product(parameter.unit_shape));
      schulz[static_cast<size_t>(piece.owner)] += units * newton_schulz_flops(parameter.unit_shape);
    }
    plan_.newton_schulz_flops = most(schulz);
    plan_.pass_seconds = plan_.pass_flops / params_.flops_per_second;
    plan_.optimizer_seconds = plan_.newton_schulz_flops / params_.flops_per_second;
    plan_.exchange_seconds =
        std::max(plan_.gradients_sent, plan_.gradients_received) / params_.bytes_per_second;
    plan_.spread_seconds = plan_.values_received / params_.bytes_per_second;
  }

  const model::ModelConfig& config_;
  const TrainPlanParams& params_;
  std::vector<Field> fields_;
  std::vector<size_t> places_;  ///< of the plan's items among the fields
  std::vector<double> owned_;   ///< elements on each rank
  TrainPlan plan_;
};

}  // namespace

const char* rule_name(UpdateRule rule) {
  constexpr const char* kNames[] = {"Muon", "AdamW, decay", "AdamW", "none"};
  return kNames[static_cast<int>(rule)];
}

std::vector<PlanItem> plan_items(const model::ModelConfig& config) {
  std::vector<PlanItem> items;
  for (const Field& field : fields_of(config))
    if (update_rule(field.kind) != UpdateRule::kNone)
      items.push_back(plan_item(field.name, field.kind, field.shape, field.units));
  return items;
}

TrainPlan make_train_plan(const model::ModelConfig& config, const TrainPlanParams& params) {
  return Maker(config, params).make();
}

}  // namespace hadal::train
