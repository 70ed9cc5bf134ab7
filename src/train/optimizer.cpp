#include "train/optimizer.h"

#include <bit>
#include <deque>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/quant/official_storage.h"
#include "train/adamw.h"
#include "train/muon.h"
#include "train/slots.h"

namespace hadal::train {
namespace {

using model::Parameter;
using ops::Numerics;

/// The operand's values of a flat piece of FP32 masters: whole matrices where their storage has
/// blocks.
at::Tensor rounded(const Parameter& parameter, const at::Tensor& master, Numerics numerics) {
  if (numerics == Numerics::kBf16 || !parameter.is_matrix()) return master.to(at::kBFloat16);
  std::vector<int64_t> shape = parameter.local_shape();
  shape[0] = -1;
  return ops::official_rounding(master.view(shape), parameter.storage_in(numerics)).view({-1});
}

/// A leaf of autograd whose gradient is FP32, whatever its own type.
at::Tensor leaf(const at::Tensor& values) {
  at::Tensor result = values.requires_grad_(true);
  if (values.scalar_type() == at::kBFloat16) result.set_grad_dtype(at::kFloat);
  return result;
}

/// The sum of squares in FP64, in one order.
template <typename T>
double sum_of_squares(const T* values, int64_t count) {
  constexpr int64_t kLanes = 8;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const auto value = static_cast<double>(values[i + lane]);
      lanes[lane] += value * value;
    }
  }
  double sum = 0.0;
  for (const double lane : lanes) sum += lane;
  for (; i < count; ++i) sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  return sum;
}

/// Elements whose squares are one sum, at most; they never cross a unit of the plan.
constexpr int64_t kNormBlock = int64_t{1} << 16;

}  // namespace

at::Tensor OwnedPiece::values() const {
  return master.defined() ? master : piece_of(parameter->value.detach(), piece);
}

Optimizer::Optimizer(model::Transformer& model, OptimizerParams params, Ownership ownership)
    : params_(params), ownership_(std::move(ownership)) {
  if (ownership_.pieces().empty()) ownership_ = Ownership(model, 1, 0);
  model.visit([&](Parameter& parameter) {
    const UpdateRule rule = update_rule(parameter);
    if (rule == UpdateRule::kNone) return;
    slots_.push_back({.parameter = &parameter, .rule = rule});
    if (parameter.elsewhere) return;
    type_ = parameter.value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    HADAL_CHECK(parameter.value.requires_grad() && parameter.value.is_leaf(),
                "optimizer: ", parameter.name, " is no leaf that requires a gradient");
    HADAL_CHECK(parameter.value.is_contiguous(), "optimizer: ", parameter.name,
                " is not contiguous");
  });
  for (const PlanPiece& piece : ownership_.pieces()) {
    place_.push_back(ownership_.here(piece) ? std::ssize(pieces_) : -1);
    if (!ownership_.here(piece)) continue;
    const OptimizerSlot& slot = slots_.at(piece.item);
    OwnedPiece own{.piece = piece,
                   .parameter = slot.parameter,
                   .rule = slot.rule,
                   .master = {},
                   .momentum = {},
                   .variance = {},
                   .gradient = {}};
    own.momentum = at::zeros_like(own.values());
    if (slot.rule != UpdateRule::kMuon) own.variance = at::zeros_like(own.momentum);
    pieces_.push_back(std::move(own));
  }
}

void Optimizer::hold_for(Numerics numerics, dist::Ranks& ranks) {
  if (ranks.size() == 1) return;  // the value is the master, and its operand is made of it
  const at::NoGradGuard no_grad;
  const Numerics before = std::exchange(numerics_, numerics);
  std::vector<bool> asked(slots_.size(), false);  // for what only the owner knows
  for (size_t s = 0; s < slots_.size(); ++s) {
    Parameter& parameter = *slots_[s].parameter;
    if (parameter.elsewhere) continue;
    const at::Tensor value = parameter.value.detach();
    const bool was_rounded = value.scalar_type() == at::kBFloat16;
    const bool is_now = is_rounded(parameter.kind, parameter.storage, numerics) &&
                        !parameter.as_stored && (was_rounded || value.scalar_type() == at::kFloat);
    if (!was_rounded && !is_now) continue;
    asked[s] = was_rounded && (!is_now || numerics != before);
    if (was_rounded == is_now) continue;
    const at::Tensor held = is_now
                                ? rounded(parameter, value.view({-1}), numerics).view(value.sizes())
                                : at::empty(value.sizes(), value.options().dtype(at::kFloat));
    for (OwnedPiece& own : pieces_) {
      if (own.piece.item != s) continue;
      if (is_now) {
        own.master = own.values().clone();
      } else {
        piece_of(held, own.piece).copy_(own.master);
        own.master.reset();
      }
    }
    parameter.hold(leaf(held));
  }
  std::vector<size_t> pieces;
  for (size_t p = 0; p < place_.size(); ++p)
    if (asked[ownership_.pieces()[p].item]) pieces.push_back(p);  // nothing of other stages
  spread(pieces, ranks);
}

void Optimizer::zero_grad() {
  for (OptimizerSlot& slot : slots_)
    if (!slot.parameter->elsewhere) slot.parameter->value.mutable_grad().reset();
  for (OwnedPiece& own : pieces_) own.gradient.reset();
}

at::Tensor Optimizer::gradient(const OwnedPiece& own) const {
  if (ownership_.ranks() > 1) return own.gradient;
  const at::Tensor& whole = own.parameter->value.grad();
  return whole.defined() ? whole.reshape({-1}) : whole;
}

void Optimizer::set_gradient(size_t piece, at::Tensor gradient) {
  pieces_.at(static_cast<size_t>(place_.at(piece))).gradient = std::move(gradient);
}

void Optimizer::fill_gradients(const std::function<bool(const Parameter&)>& trained) {
  for (OptimizerSlot& slot : slots_) {
    slot.trained = trained(*slot.parameter);
    HADAL_CHECK(
        slot.trained || slot.parameter->elsewhere || !slot.parameter->value.grad().defined(),
        "optimizer: ", slot.parameter->name, " has a gradient in a step that does not train it");
  }
  for (OwnedPiece& own : pieces_) {
    const bool is_trained = slots_[own.piece.item].trained;
    HADAL_CHECK(is_trained || !own.gradient.defined(), "optimizer: ", own.parameter->name,
                " has a gradient in a step that does not train it");
    if (!is_trained || gradient(own).defined()) continue;
    if (ownership_.ranks() > 1) {
      own.gradient = at::zeros_like(own.momentum);
    } else {
      own.parameter->value.mutable_grad() = at::zeros_like(own.parameter->value.detach());
    }
  }
}

std::vector<at::Tensor> Optimizer::gradients() const {
  std::vector<at::Tensor> grads;
  for (const OwnedPiece& own : pieces_) {
    const at::Tensor grad = ownership_.ranks() > 1 ? own.gradient : own.parameter->value.grad();
    if (grad.defined()) grads.push_back(grad);
  }
  return grads;
}

/// Of every block of every piece in the model's order; zeros where another rank has it.
std::vector<double> Optimizer::squares() const {
  struct Block {
    at::Tensor gradient;
    int64_t begin, size;
    size_t number;
  };
  std::vector<Block> blocks;
  size_t number = 0;
  for (size_t p = 0; p < place_.size(); ++p) {
    const PlanPiece& piece = ownership_.pieces()[p];
    const Parameter& parameter = *slots_[piece.item].parameter;
    const PlanItem item =
        plan_item(parameter.name, parameter.kind, parameter.local_shape(), parameter.local_units());
    const at::Tensor grad =
        place_[p] < 0 ? at::Tensor() : gradient(pieces_[static_cast<size_t>(place_[p])]);
    for (int64_t unit = 0; unit < piece.size(); unit += item.unit) {
      const int64_t end = std::min(piece.size(), unit + item.unit);
      for (int64_t begin = unit; begin < end; begin += kNormBlock, ++number) {
        if (grad.defined())
          blocks.push_back({grad, begin, std::min(kNormBlock, end - begin), number});
      }
    }
  }
  std::vector<double> sums(number, 0.0);
  parallel_for(std::ssize(blocks), 16, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const Block& block = blocks[static_cast<size_t>(b)];
      const at::Tensor& grad = block.gradient;
      sums[block.number] =
          grad.scalar_type() == at::kDouble
              ? sum_of_squares(grad.const_data_ptr<double>() + block.begin, block.size)
              : sum_of_squares(grad.const_data_ptr<float>() + block.begin, block.size);
    }
  });
  return sums;
}

at::Tensor Optimizer::grad_norm() const {
  dist::Ranks one;
  return grad_norm(one);
}

at::Tensor Optimizer::grad_norm(dist::Ranks& ranks) const {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> here = gradients();
  if (ranks.size() == 1) {
    HADAL_CHECK(!here.empty(), "optimizer: no parameter has a gradient");
    if (!here[0].is_cpu()) return at::stack(at::_foreach_norm(here)).square().sum().sqrt();
  }
  // Every block's sum from its owner, bit by bit: then the sum over all of them is that of one
  // rank.
  const std::vector<double> own = squares();
  std::vector<int64_t> words{std::ssize(here)};
  for (const double sum : own) words.push_back(std::bit_cast<int64_t>(sum));
  ranks.sum(words);
  HADAL_CHECK(words[0] > 0, "optimizer: no parameter has a gradient");
  double sum = 0.0;
  for (size_t i = 1; i < words.size(); ++i) sum += std::bit_cast<double>(words[i]);
  return at::full({}, std::sqrt(sum), type_);
}

at::Tensor Optimizer::clip_gradients(double max_norm) {
  dist::Ranks one;
  return clip_gradients(max_norm, one);
}

at::Tensor Optimizer::clip_gradients(double max_norm, dist::Ranks& ranks) {
  const at::NoGradGuard no_grad;
  const at::Tensor norm = grad_norm(ranks);
  const at::Tensor factor = (max_norm / (norm + 1e-12)).clamp_max(1.0);
  // A rank may own nothing that has a gradient.
  const std::vector<at::Tensor> own = gradients();
  if (!own.empty()) at::_foreach_mul_(own, factor);
  return norm;
}

void Optimizer::spread(dist::Ranks& ranks) {
  if (ranks.size() == 1) return;
  std::vector<size_t> trained;
  for (size_t p = 0; p < place_.size(); ++p)
    if (slots_[ownership_.pieces()[p].item].trained && ownership_.reads(ownership_.pieces()[p]))
      trained.push_back(p);
  for (OwnedPiece& own : pieces_) own.gradient.reset();
  spread(trained, ranks);
}

std::vector<dist::Transfer> Optimizer::send_to_readers(const at::Tensor& bundle,
                                                       size_t piece,
                                                       dist::Ranks& ranks) const {
  const PlanPiece& first = ownership_.pieces()[piece];
  const Span readers = ownership_.readers(first);
  std::vector<dist::Transfer> transfers;
  if (readers.size() == ranks.size()) {
    transfers.push_back(ranks.broadcast(bundle, first.owner));
  } else if (ownership_.here(first)) {
    for (int64_t rank = readers.begin; rank < readers.end; ++rank)
      if (rank != first.owner)
        transfers.push_back(ranks.send(bundle, rank, static_cast<int64_t>(piece)));
  } else {
    transfers.push_back(ranks.receive(bundle, first.owner, static_cast<int64_t>(piece)));
  }
  return transfers;
}

void Optimizer::spread(const std::vector<size_t>& pieces, dist::Ranks& ranks) {
  const at::NoGradGuard no_grad;
  std::vector<Ownership::Message> messages;
  for (const size_t p : pieces) {
    const PlanPiece& piece = ownership_.pieces()[p];
    messages.push_back({p, piece.size(), slots_[piece.item].parameter->value.element_size()});
  }
  struct UnderWay {
    at::Tensor bundle;
    std::vector<at::Tensor> places;  ///< in the values; empty where the bundle is their memory
    std::vector<dist::Transfer> transfers;
  };
  std::deque<UnderWay> under_way;
  const auto finish = [](UnderWay& message) {
    for (dist::Transfer& transfer : message.transfers) transfer.wait();
    std::vector<int64_t> sizes;
    for (const at::Tensor& place : message.places) sizes.push_back(place.numel());
    const std::vector<at::Tensor> parts = unbundled(message.bundle, sizes);
    for (size_t i = 0; i < parts.size(); ++i) message.places[i].copy_(parts[i]);
  };
  constexpr size_t kUnderWay = 32;
  for (const std::vector<size_t>& bundle : ownership_.bundles(messages)) {
    std::vector<at::Tensor> places;
    for (const size_t p : bundle) {
      const PlanPiece& piece = ownership_.pieces()[p];
      const Parameter& parameter = *slots_[piece.item].parameter;
      places.push_back(piece_of(parameter.value.detach(), piece));
      if (place_[p] < 0 || places.back().scalar_type() != at::kBFloat16) continue;
      places.back().copy_(
          rounded(parameter, pieces_[static_cast<size_t>(place_[p])].values(), numerics_));
    }
    const PlanPiece& first = ownership_.pieces()[bundle[0]];
    UnderWay message{.bundle = bundled(places), .places = {}, .transfers = {}};
    if (!ownership_.here(first) && places.size() > 1) message.places = places;
    message.transfers = send_to_readers(message.bundle, bundle[0], ranks);
    under_way.push_back(std::move(message));
    for (; under_way.size() > kUnderWay; under_way.pop_front()) finish(under_way.front());
  }
  for (UnderWay& message : under_way) finish(message);
}

void Optimizer::step(double lr) {
  const at::NoGradGuard no_grad;
  ++num_steps_;
  std::vector<MovedPiece> moved;
  for (const OwnedPiece& own : pieces_) {
    const at::Tensor grad = gradient(own);
    if (!grad.defined()) continue;
    moved.push_back({own.parameter, own.rule, own.values(), grad, own.momentum, own.variance});
  }
  muon_step(moved, params_, lr);
  adamw_step(moved, params_, num_steps_, lr);
}

std::vector<StateTensor> Optimizer::state() const {
  std::vector<StateTensor> result;
  const auto add = [&](size_t slot, const char* suffix, at::Tensor OwnedPiece::*moment) {
    const Parameter& parameter = *slots_[slot].parameter;
    StateTensor tensor{
        .name = parameter.name + suffix,
        .whole = at::empty(parameter.local_shape(), at::TensorOptions(at::kMeta).dtype(type_)),
        .parts = {}};
    for (const OwnedPiece& own : pieces_)
      if (own.piece.item == slot) tensor.parts.push_back({own.piece.begin, own.*moment});
    result.push_back(std::move(tensor));
  };
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    add(slot, "/momentum", &OwnedPiece::momentum);
    if (slots_[slot].rule != UpdateRule::kMuon) add(slot, "/variance", &OwnedPiece::variance);
  }
  return result;
}

StateTensor Optimizer::masters(size_t slot) const {
  const Parameter& parameter = *slots_.at(slot).parameter;
  StateTensor tensor{
      .name = parameter.name,
      .whole = at::empty(parameter.local_shape(), at::TensorOptions(at::kMeta).dtype(type_)),
      .parts = {}};
  for (const OwnedPiece& own : pieces_)
    if (own.piece.item == slot) tensor.parts.push_back({own.piece.begin, own.values()});
  return tensor;
}

}  // namespace hadal::train
