#include "model/contiguous_kv.h"

#include <algorithm>
#include <cstring>

#include <ATen/ATen.h>

#include "base/check.h"

namespace hadal::model {
namespace {

at::Tensor upload(const std::vector<int64_t>& values, at::Device device) {
  return at::tensor(values, at::kLong).to(device);
}

/// Row from[i] of x becomes row to[i] of y; both on the CPU, contiguous and of one type.
void copy_rows(const at::Tensor& x,
               const std::vector<int64_t>& from,
               const at::Tensor& y,
               const std::vector<int64_t>& to) {
  HADAL_CHECK(x.size(1) == y.size(1), "contiguous_kv: rows of ", x.size(1), " channels for ",
              y.size(1));
  const int64_t bytes = x.size(1) * x.element_size();
  const auto* source = static_cast<const char*>(x.const_data_ptr());
  auto* target = static_cast<char*>(y.mutable_data_ptr());
  for (size_t i = 0; i < from.size(); ++i) {
    std::memcpy(target + to[i] * bytes, source + from[i] * bytes, static_cast<size_t>(bytes));
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
      furthest_(static_cast<size_t>(slots), 0) {
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
  for (int64_t block = 0; block < config.n_blocks(); ++block) {
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
  return ops::Batch(lengths, starts, device_);
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
  ops::RingView view{.rows = ring.rows, .first_row = {}, .ring = ring.size};
  for (const int64_t slot : active_) view.first_row.push_back(slot * ring.size);
  return view;
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
  ops::BlockView view{.rows = store.rows.flatten(0, 1), .page_start = {}};
  int64_t next = 0;
  for (size_t i = 0; i < active_.size(); ++i) {
    const int64_t slot = active_[i], first = length(slot) / ratio;
    const int64_t count = (length(slot) + active_lengths_[i]) / ratio - first;
    if (count > 0) {
      store.rows[slot].narrow(0, first, count).copy_(rows.narrow(0, next, count));
    }
    view.page_start.push_back({slot * store.capacity});
    next += count;
  }
  HADAL_CHECK(next == rows.size(0), "contiguous_kv: ", rows.size(0), " rows for ", next, " blocks");
  return view;
}

void ContiguousKv::commit(int64_t block, RingKind kind, const at::Tensor& rows) {
  Ring& ring = rings_.at({block, kind});
  std::vector<int64_t> from, to;
  int64_t token = 0;
  for (size_t i = 0; i < active_.size(); ++i) {
    const int64_t start = length(active_[i]), count = active_lengths_[i];
    for (int64_t t = std::max<int64_t>(0, count - ring.size); t < count; ++t) {
      from.push_back(token + t);
      to.push_back(active_[i] * ring.size + (start + t) % ring.size);
    }
    token += count;
  }
  if (device_.is_cpu() && rows.scalar_type() == ring.rows.scalar_type()) {
    copy_rows(rows.contiguous(), from, ring.rows, to);
    return;
  }
  ring.rows.index_copy_(0, upload(to, device_), rows.index_select(0, upload(from, device_)));
}

}  // namespace hadal::model
