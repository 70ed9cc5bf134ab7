#include "train/state_copy.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "base/parallel.h"
#include "checkpoint/checksum.h"

namespace hadal::train {
namespace {

int64_t unit_of(const model::Parameter& parameter) {
  return plan_item(parameter.name, parameter.kind, parameter.local_shape(), parameter.local_units())
      .unit;
}

}  // namespace

std::vector<NamedState> named_state(model::Transformer& model, const Optimizer& optimizer) {
  std::vector<NamedState> result;
  size_t slot = 0;
  model.visit([&](model::Parameter& parameter) {
    if (slot < optimizer.slots().size() && optimizer.slots()[slot].parameter == &parameter) {
      result.push_back({.tensor = optimizer.masters(slot++), .unit = unit_of(parameter)});
      return;
    }
    // Moved by no gradient: every rank of its stage has it.
    if (parameter.elsewhere) {
      const auto type = parameter.kind == model::ParamKind::kHashTable ? at::kLong : at::kFloat;
      const at::Tensor whole =
          at::empty(parameter.local_shape(), at::TensorOptions(at::kMeta).dtype(type));
      result.push_back({.tensor = {.name = parameter.name, .whole = whole, .parts = {}},
                        .unit = std::max<int64_t>(1, whole.numel()),
                        .everywhere = true});
      return;
    }
    const at::Tensor value = parameter.value.detach();
    result.push_back({.tensor = {.name = parameter.name,
                                 .whole = value.to(at::kMeta),
                                 .parts = {{0, value.view({-1})}}},
                      .unit = std::max<int64_t>(1, value.numel()),
                      .everywhere = true});
  });
  size_t moment = 0;
  const std::vector<StateTensor> moments = optimizer.state();
  for (const OptimizerSlot& moved : optimizer.slots()) {
    const int64_t unit = unit_of(*moved.parameter);
    for (int i = 0; i < (moved.rule == UpdateRule::kMuon ? 1 : 2); ++i)
      result.push_back({.tensor = moments.at(moment++), .unit = unit});
  }
  HADAL_CHECK(moment == moments.size(), "named_state: ", moments.size(), " moments, expected ",
              moment);
  return result;
}

int64_t state_bytes(const std::vector<NamedState>& state) {
  size_t bytes = 0;
  for (const NamedState& each : state)
    for (const StateTensor::Part& part : each.tensor.parts) bytes += part.values.nbytes();
  return static_cast<int64_t>(bytes);
}

StateCopy::StateCopy(std::vector<NamedState> state) : tensors_(std::move(state)) {
  constexpr size_t kAlign = 64;
  const auto padded = [](size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; };
  size_t total = 0;
  std::vector<std::pair<at::Tensor*, size_t>> places;
  for (NamedState& each : tensors_) {
    for (StateTensor::Part& part : each.tensor.parts) {
      places.emplace_back(&part.values, total);
      total += padded(part.values.nbytes());
    }
  }
  memory_ = std::make_unique_for_overwrite<std::byte[]>(total);
  std::vector<at::Tensor> sources;
  for (const auto& [values, place] : places) {
    sources.push_back(values->detach());
    *values = at::from_blob(memory_.get() + place, values->sizes(),
                            at::TensorOptions().dtype(values->scalar_type()));
  }
  // What is on a card LibTorch brings here; memory needs none of its threads.
  const auto copy = [&](size_t i) {
    const at::Tensor& to = *places[i].first;
    const at::Tensor& from = sources[i];
    if (from.is_cpu() && from.is_contiguous()) {
      std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), from.nbytes());
    } else {
      to.copy_(from);
    }
  };
  const at::NoGradGuard no_grad;
  const bool on_cpu = std::ranges::all_of(sources, [](const at::Tensor& t) { return t.is_cpu(); });
  parallel_for(std::ssize(places), on_cpu ? 1 : std::max<int64_t>(1, std::ssize(places)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) copy(static_cast<size_t>(i));
               });
}

std::vector<CheckedBlock> checked_blocks(int64_t elements, int64_t unit) {
  std::vector<CheckedBlock> blocks;
  for (int64_t first = 0; first < elements; first += unit) {
    const int64_t last = std::min(elements, first + unit);
    for (int64_t begin = first; begin < last; begin += kCheckedElements)
      blocks.push_back({begin, std::min(last, begin + kCheckedElements)});
  }
  return blocks;
}

uint64_t joined_checksum(std::span<const uint64_t> blocks) {
  return checkpoint::checksum(std::as_bytes(blocks));
}

}  // namespace hadal::train
