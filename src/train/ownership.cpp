#include "train/ownership.h"

#include <algorithm>
#include <map>
#include <numeric>

#include <ATen/ATen.h>

#include "base/check.h"

namespace hadal::train {

using model::ParamKind;

UpdateRule update_rule(ParamKind kind) {
  switch (kind) {
    case ParamKind::kMatrix:
    case ParamKind::kGroups:
    case ParamKind::kExperts:
    case ParamKind::kHcFn:
      return UpdateRule::kMuon;
    case ParamKind::kEmbedding:
    case ParamKind::kHead:
      return UpdateRule::kAdamDecay;
    case ParamKind::kNorm:
    case ParamKind::kHcBase:
    case ParamKind::kHcScale:
    case ParamKind::kSink:
    case ParamKind::kApe:
      return UpdateRule::kAdam;
    case ParamKind::kGateBias:
    case ParamKind::kHashTable:
      return UpdateRule::kNone;
  }
  return UpdateRule::kNone;
}

UpdateRule update_rule(const model::Parameter& parameter) { return update_rule(parameter.kind); }

bool is_rounded(ParamKind kind, model::Storage storage, ops::Numerics numerics) {
  switch (kind) {
    case ParamKind::kMatrix:
    case ParamKind::kGroups:
    case ParamKind::kExperts:
    case ParamKind::kEmbedding:
    case ParamKind::kHead:
      return numerics != ops::Numerics::kIdeal && storage != model::Storage::kF32;
    default:
      return false;
  }
}

int64_t state_bytes(UpdateRule rule) {
  switch (rule) {
    case UpdateRule::kMuon:
      return 4 + 4;
    case UpdateRule::kAdamDecay:
    case UpdateRule::kAdam:
      return 4 + 8;
    case UpdateRule::kNone:
      return 0;
  }
  return 0;
}

PlanItem plan_item(const std::string& name,
                   ParamKind kind,
                   const std::vector<int64_t>& shape,
                   int64_t units) {
  const UpdateRule rule = update_rule(kind);
  HADAL_CHECK(rule != UpdateRule::kNone, "plan_item: ", name, " is moved by no rule");
  const int64_t elements =
      std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  if (rule != UpdateRule::kMuon) return {Share::kElements, elements, kElementBlock};
  if (kind != ParamKind::kExperts) {
    // FP8 rounds a stored matrix in blocks of 128 rows, which must stay together.
    constexpr int64_t kBlockRows = 128;
    const bool may_be_cut = shape.size() == 2 && shape[0] % (units * kBlockRows) == 0;
    return {Share::kDense, elements, may_be_cut ? elements / units : elements};
  }
  const auto is = [&](const char* matrix) { return name.find(matrix) != std::string::npos; };
  const Share share = is(".w2.") ? Share::kDown : is(".w3.") ? Share::kUp : Share::kGate;
  HADAL_CHECK(share != Share::kGate || is(".w1."), "plan_item: ", name, " is no matrix of experts");
  return {share, elements, elements / units};
}

Ownership::Ownership(const model::Transformer& model, int64_t ranks, int64_t rank, int64_t cap)
    : Ownership(model,
                dist::Mesh(ranks, {}),
                rank,
                model::StageSplit(model.config(), {model.config().n_layers}, "ownership"),
                cap) {}

Ownership::Ownership(const model::Transformer& model,
                     const dist::Mesh& mesh,
                     int64_t rank,
                     const model::StageSplit& split,
                     int64_t cap)
    : mesh_(mesh), rank_(rank) {
  struct Stage {
    std::vector<PlanItem> items;
    std::vector<size_t> numbers;  // of the items among those of all stages
  };
  std::vector<Stage> stages(static_cast<size_t>(split.size()));
  std::vector<int64_t> bytes;  // of an element
  size_t parameters = 0;
  model.visit([&](const model::Parameter& parameter) {
    const int64_t stage = split.stage_of_parameters().at(parameters++);
    const UpdateRule rule = update_rule(parameter);
    if (rule == UpdateRule::kNone) return;
    Stage& its = stages[static_cast<size_t>(stage)];
    its.items.push_back(plan_item(parameter.name, parameter.kind, parameter.local_shape(),
                                  parameter.local_units()));
    its.numbers.push_back(stages_.size());
    stages_.push_back(stage);
    bytes.push_back(state_bytes(rule));
  });
  const int64_t sharing = mesh.ranks() / split.size();
  for (size_t s = 0; s < stages.size(); ++s) {
    const auto& [items, numbers] = stages[s];
    for (PlanPiece piece : plan_zero(items, sharing, cap > 0 ? cap : dense_cap(items)).pieces) {
      piece.item = numbers[piece.item];
      piece.owner += static_cast<int64_t>(s) * sharing;
      pieces_.push_back(piece);
    }
  }
  std::ranges::stable_sort(pieces_, {}, &PlanPiece::item);
  std::vector<int64_t> loads(static_cast<size_t>(mesh.ranks()), 0);
  for (const PlanPiece& piece : pieces_)
    loads[static_cast<size_t>(piece.owner)] += piece.size() * bytes[piece.item];
  load_ = {.most = *std::max_element(loads.begin(), loads.end()),
           .total = std::accumulate(loads.begin(), loads.end(), int64_t{0})};
}

Span Ownership::readers(const PlanPiece& piece) const {
  const int64_t sharing = mesh_.ranks() / mesh_.shape().pipeline;
  const int64_t first = stages_[piece.item] * sharing;
  return {first, first + sharing};
}

bool Ownership::reads(const PlanPiece& piece) const {
  const Span span = readers(piece);
  return span.begin <= rank_ && rank_ < span.end;
}

std::vector<std::vector<size_t>> Ownership::bundles(const std::vector<Message>& messages) const {
  // A message costs as much as some 100 KB of it; larger bundles would only be copied for longer.
  constexpr int64_t kAlone = 128 << 10, kFull = 512 << 10;
  struct Open {
    size_t bundle;
    int64_t bytes;
  };
  std::map<std::pair<int64_t, int64_t>, Open> open;  // by owner and element size
  std::vector<std::vector<size_t>> result;
  for (const Message& message : messages) {
    const int64_t size = message.elements * message.element_bytes;
    const std::pair key{pieces_[message.piece].owner, message.element_bytes};
    const auto found = open.find(key);
    if (size < kAlone && found != open.end() && found->second.bytes + size <= kFull) {
      result[found->second.bundle].push_back(message.piece);
      found->second.bytes += size;
      continue;
    }
    if (size < kAlone) open[key] = {result.size(), size};
    result.push_back({message.piece});
  }
  return result;
}

at::Tensor piece_of(const at::Tensor& whole, const PlanPiece& piece) {
  return whole.view({-1}).narrow(0, piece.begin, piece.size());
}

at::Tensor bundled(const std::vector<at::Tensor>& tensors) {
  return tensors.size() == 1 ? tensors[0].contiguous() : at::cat(tensors);
}

std::vector<at::Tensor> unbundled(const at::Tensor& bundle, const std::vector<int64_t>& sizes) {
  std::vector<at::Tensor> result;
  int64_t begin = 0;
  for (const int64_t size : sizes) {
    result.push_back(bundle.narrow(0, begin, size));
    begin += size;
  }
  return result;
}

}  // namespace hadal::train
