#include "model/contiguous_kv.h"

#include <algorithm>
#include <cstring>

#include <ATen/ATen.h>

#include "base/check.h"

namespace hadal::model {
namespace {

/// Row from[i] of x becomes row to[i] of y; both on the CPU, contiguous and of one type.
void copy_rows(const at::Tensor& x,
               const at::Tensor& from,
               const at::Tensor& y,
               const at::Tensor& to) {
  HADAL_CHECK(x.size(1) == y.size(1), "contiguous_kv: rows of ", x.size(1), " channels for ",
              y.size(1));
  const int64_t bytes = x.size(1) * x.element_size();
  const auto* source = static_cast<const char*>(x.const_data_ptr());
  auto* target = static_cast<char*>(y.mutable_data_ptr());
  const int64_t *sources = from.const_data_ptr<int64_t>(), *targets = to.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < from.numel(); ++i) {
    std::memcpy(target + targets[i] * bytes, source + sources[i] * bytes,
                static_cast<size_t>(bytes));
  }
}

}  // namespace

ContiguousKv::ContiguousKv(const ModelConfig& config,
                           int64_t slots,
                           int64_t max_tokens,
                           at::ScalarType dtype,
                           at::Device device,
                           int64_t slack)
    : config_(config),
      num_slots_(slots),
      max_tokens_(max_tokens),
      slack_(slack),
      device_(device),
      lengths_(static_cast<size_t>(slots), 0),
      furthest_(static_cast<size_t>(slots), 0),
      lines_(at::arange(slots, at::TensorOptions(at::kInt).device(device)).unsqueeze(1)) {
  HADAL_CHECK(slots >= 1 && max_tokens >= 1 && slack >= 0, "contiguous_kv: ", slots, " slots of ",
              max_tokens, " tokens, slack ", slack);
  const at::ScalarType state = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const auto add_ring = [&](int64_t block, RingKind kind, int64_t size, int64_t width,
                            at::ScalarType type) {
    rings_[{block, kind}] = {
        .rows = at::zeros({slots * size, width}, at::TensorOptions(type).device(device)),
        .size = size};
  };
  const auto add_blocks = [&](int64_t block, BlockKind kind, int64_t width) {
    blocks_[{block, kind}] = {
        .rows = at::zeros({slots, 0, width}, at::TensorOptions(dtype).device(device)),
        .capacity = 0};
  };
  for (int64_t block = 0; block < config.n_drafting_blocks(); ++block) {
    add_ring(block, RingKind::kWindow, config.window_size + slack, config.head_dim, dtype);
    const int64_t ratio = config.ratio(block);
    if (ratio == 0) continue;
    const int64_t overlap = ModelConfig::overlap(ratio), size = overlap * ratio + slack;
    add_ring(block, RingKind::kKv, size, overlap * config.head_dim, state);
    add_ring(block, RingKind::kScore, size, overlap * config.head_dim, state);
    add_blocks(block, BlockKind::kCompressed, config.head_dim);
    if (config.kind(block) != LayerKind::kCsa) continue;
    add_ring(block, RingKind::kIndexKv, size, overlap * config.index_head_dim, state);
    add_ring(block, RingKind::kIndexScore, size, overlap * config.index_head_dim, state);
    add_blocks(block, BlockKind::kIndexKeys, config.index_head_dim);
  }
}

void ContiguousKv::reset(int64_t slot) {
  lengths_.at(static_cast<size_t>(slot)) = 0;
  furthest_.at(static_cast<size_t>(slot)) = 0;
}

int64_t ContiguousKv::rollback_floor(int64_t slot) const {
  return std::max<int64_t>(0, furthest_.at(static_cast<size_t>(slot)) - slack_);
}

void ContiguousKv::rollback(int64_t slot, int64_t length) {
  int64_t& current = lengths_.at(static_cast<size_t>(slot));
  HADAL_CHECK(length <= current && length >= rollback_floor(slot),
              "contiguous_kv: cannot roll slot ", slot, " back from ", current, " to ", length,
              " tokens; the shortest kept is ", rollback_floor(slot));
  current = length;
}

ops::Batch ContiguousKv::begin(const std::vector<int64_t>& slots,
                               const std::vector<int64_t>& lengths) {
  std::vector<int64_t> starts;
  for (size_t i = 0; i < slots.size(); ++i) {
    starts.push_back(length(slots[i]));
    HADAL_CHECK(starts.back() + lengths[i] <= max_tokens_, "contiguous_kv: slot ", slots[i],
                " holds ", starts.back(), " tokens, ", lengths[i], " more exceed ", max_tokens_);
    HADAL_CHECK(std::count(slots.begin(), slots.end(), slots[i]) == 1, "contiguous_kv: slot ",
                slots[i], " appears twice");
  }
  active_ = slots;
  active_lengths_ = lengths;
  return step_.emplace(lengths, starts, device_, ops::StepPlaces{.slots = slots});
}

void ContiguousKv::advance() {
  for (size_t i = 0; i < active_.size(); ++i) {
    const auto slot = static_cast<size_t>(active_[i]);
    lengths_[slot] += active_lengths_[i];
    furthest_[slot] = std::max(furthest_[slot], lengths_[slot]);
  }
}

ops::RingView ContiguousKv::ring(int64_t block, RingKind kind) {
  const Ring& ring = rings_.at({block, kind});
  return {.rows = ring.rows, .slots = step_.value().slots(), .ring = ring.size};
}

void ContiguousKv::grow(Rows& store, int64_t needed) {
  if (needed <= store.capacity) return;
  const int64_t capacity = std::max({needed, 2 * store.capacity, int64_t{64}});
  at::Tensor rows = at::zeros({num_slots_, capacity, store.rows.size(2)}, store.rows.options());
  rows.narrow(1, 0, store.capacity).copy_(store.rows);
  store.rows = rows;
  store.capacity = capacity;
}

ops::BlockView ContiguousKv::append_blocks(int64_t block, BlockKind kind, const at::Tensor& rows) {
  Rows& store = blocks_.at({block, kind});
  const int64_t ratio = config_.ratio(block);
  int64_t needed = 1;
  for (size_t i = 0; i < active_.size(); ++i) {
    needed = std::max(needed, (length(active_[i]) + active_lengths_[i]) / ratio);
  }
  grow(store, needed);
  int64_t next = 0;
  for (size_t i = 0; i < active_.size(); ++i) {
    const int64_t slot = active_[i], first = length(slot) / ratio;
    const int64_t count = (length(slot) + active_lengths_[i]) / ratio - first;
    if (count > 0) {
      store.rows[slot].narrow(0, first, count).copy_(rows.narrow(0, next, count));
    }
    next += count;
  }
  HADAL_CHECK(next == rows.size(0), "contiguous_kv: ", rows.size(0), " rows for ", next, " blocks");
  return {.rows = store.rows.flatten(0, 1),
          .slots = step_.value().slots(),
          .pages = lines_,
          .page_rows = store.capacity};
}

void ContiguousKv::commit(int64_t block, RingKind kind, const at::Tensor& rows) {
  Ring& ring = rings_.at({block, kind});
  const auto& [from, to] = step_.value().ring_writes(ring.size);
  if (device_.is_cpu() && rows.scalar_type() == ring.rows.scalar_type()) {
    copy_rows(rows.contiguous(), from, ring.rows, to);
    return;
  }
  ring.rows.index_copy_(0, to, rows.index_select(0, from));
}

}  // namespace hadal::model
