#include "engine/kv_cache.h"

#include <algorithm>
#include <numeric>
#include <set>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/math.h"

namespace hadal::engine {
namespace {

using model::BlockKind;
using model::ModelConfig;
using model::RingKind;
using ops::Numerics;
using ops::RowFormat;
using ops::RowKind;

}  // namespace

int64_t page_tokens_of(const ModelConfig& config) {
  int64_t unit = 1;
  for (const int64_t ratio : config.compress_ratios) {
    if (ratio > 0) unit = std::lcm(unit, ratio);
  }
  return align_up(int64_t{256}, unit);
}

KvCache::KvCache(const ModelConfig& config, const KvCacheOptions& options)
    : config_(config),
      options_(options),
      page_tokens_(page_tokens_of(config)),
      tables_(options.device) {
  HADAL_CHECK(options.num_pages >= 1 && options.num_slots >= 1 && options.slack >= 0,
              "kv_cache: ", options.num_pages, " pages, ", options.num_slots, " slots, slack ",
              options.slack);
  const bool packs = options.numerics == Numerics::kReleased;
  const at::ScalarType dense = options.numerics == Numerics::kIdeal ? at::kFloat : at::kBFloat16;
  const RowFormat latent{.kind = packs ? RowKind::kLatent : RowKind::kDense,
                         .width = config.head_dim,
                         .rotary = config.rope_head_dim};
  const RowFormat key{.kind = packs ? RowKind::kIndexKey : RowKind::kDense,
                      .width = config.index_head_dim};
  const int64_t slots = options.num_slots;
  const auto add_inputs = [&](int64_t block, RingKind kind, int64_t width) {
    const int64_t ratio = config.ratio(block), overlap = ModelConfig::overlap(ratio);
    const int64_t size = overlap * ratio + options.slack;
    rings_[{block, kind}] = {.memory = RowMemory(slots * size, overlap * width, {}, at::kFloat,
                                                 options.device, options.lazy),
                             .size = size,
                             .overlap = overlap - 1,
                             .ratio = ratio};
  };
  const auto add_blocks = [&](int64_t block, BlockKind kind, const RowFormat& format) {
    const int64_t ratio = config.ratio(block), page_blocks = page_tokens_ / ratio;
    const int64_t rows = options.num_pages * page_blocks + spare_rows();
    blocks_[{block, kind}] = {
        .memory = RowMemory(rows, format.width, format, dense, options.device, options.lazy),
        .page_blocks = page_blocks,
        .ratio = ratio};
  };
  const int64_t blocks = options.with_mtp ? config.n_drafting_blocks() : config.n_layers;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t rows =
        options.whole_windows ? std::max(config.window_size, page_tokens_) : config.window_size;
    const int64_t size = rows + options.slack;
    rings_[{block, RingKind::kWindow}] = {.memory = RowMemory(slots * size, config.head_dim, latent,
                                                              dense, options.device, options.lazy),
                                          .size = size,
                                          .overlap = -1,
                                          .ratio = 0};
    if (config.ratio(block) == 0) continue;
    add_inputs(block, RingKind::kKv, config.head_dim);
    add_inputs(block, RingKind::kScore, config.head_dim);
    add_blocks(block, BlockKind::kCompressed, latent);
    if (config.kind(block) != model::LayerKind::kCsa) continue;
    add_inputs(block, RingKind::kIndexKv, config.index_head_dim);
    add_inputs(block, RingKind::kIndexScore, config.index_head_dim);
    add_blocks(block, BlockKind::kIndexKeys, key);
  }
  std::set<int64_t> ratios, sizes;
  for (const auto& [id, rows] : blocks_) ratios.insert(rows.ratio);
  for (const auto& [id, ring] : rings_) sizes.insert(ring.size);
  ratios_.assign(ratios.begin(), ratios.end());
  ring_sizes_.assign(sizes.begin(), sizes.end());
  // No sequence is longer than the cache.
  pages_ = ops::PageTable(slots, options.num_pages, options.num_pages, options.device);
}

int64_t KvCache::page_bytes() const {
  int64_t bytes = 0;
  for (const auto& [id, rows] : blocks_) bytes += rows.page_bytes();
  return bytes;
}

int64_t KvCache::state_bytes() const {
  int64_t bytes = 0;
  for (const auto& [id, ring] : rings_) bytes += ring.size * ring.memory.row_bytes();
  return bytes;
}

int64_t KvCache::allocated_bytes() const {
  int64_t bytes = 0;
  for (const auto& [id, rows] : blocks_) bytes += static_cast<int64_t>(rows.memory.rows().nbytes());
  for (const auto& [id, ring] : rings_) bytes += static_cast<int64_t>(ring.memory.rows().nbytes());
  return bytes;
}

int64_t KvCache::spare_bytes() const {
  int64_t bytes = 0;
  for (const auto& [id, rows] : blocks_) bytes += spare_rows() * rows.memory.row_bytes();
  return bytes;
}

int64_t KvCache::Ring::kept(int64_t pos, int64_t window) const {
  return std::min(pos, is_window() ? window : overlap * ratio + pos % ratio);
}

int64_t KvCache::window_rows(int64_t pos) const {
  return options_.whole_windows ? std::max(config_.window_size, pos % page_tokens_)
                                : config_.window_size;
}

int64_t KvCache::kept_bytes(int64_t pos, int64_t window) const {
  int64_t bytes = 0;
  for (const auto& [id, ring] : rings_) bytes += ring.kept(pos, window) * ring.memory.row_bytes();
  return bytes;
}

int64_t KvCache::snapshot_bytes(int64_t pos) const { return kept_bytes(pos, window_rows(pos)); }

int64_t KvCache::window_bytes() const {
  return options_.whole_windows ? kept_bytes(page_tokens_, page_tokens_) : 0;
}

int64_t KvCache::window_pages() const { return ceil_div(config_.window_size, page_tokens_); }

std::vector<int64_t> KvCache::Rows::of_page(int64_t page) const {
  std::vector<int64_t> rows(static_cast<size_t>(page_blocks));
  std::iota(rows.begin(), rows.end(), page * page_blocks);
  return rows;
}

void KvCache::copy_page(int64_t from, int64_t to) {
  for (auto& [id, rows] : blocks_)
    rows.memory.copy(from * rows.page_blocks, to * rows.page_blocks, rows.page_blocks);
}

void KvCache::read_page(int64_t page, std::span<std::byte> out) const {
  HADAL_CHECK(static_cast<int64_t>(out.size()) == page_bytes(), "kv_cache: a page has ",
              page_bytes(), " bytes, not ", out.size());
  DeviceBytes bytes(out, options_.device);
  std::byte* end = bytes.to_fill();
  for (const auto& [id, rows] : blocks_) end = rows.memory.read(rows.of_page(page), end);
  bytes.wait();
}

void KvCache::write_page(int64_t page, std::span<const std::byte> in) {
  HADAL_CHECK(static_cast<int64_t>(in.size()) == page_bytes(), "kv_cache: a page has ",
              page_bytes(), " bytes, not ", in.size());
  DeviceBytes bytes(in, options_.device);
  const std::byte* end = bytes.filled();
  for (auto& [id, rows] : blocks_) end = rows.memory.write(rows.of_page(page), end);
  bytes.wait();
}

std::vector<int64_t> KvCache::kept_rows(const Ring& ring,
                                        int64_t slot,
                                        int64_t pos,
                                        int64_t window) {
  std::vector<int64_t> rows;
  for (int64_t p = pos - ring.kept(pos, window); p < pos; ++p)
    rows.push_back(slot * ring.size + p % ring.size);
  return rows;
}

void KvCache::save_kept(int64_t slot, int64_t pos, int64_t window, std::span<std::byte> out) const {
  HADAL_CHECK(static_cast<int64_t>(out.size()) == kept_bytes(pos, window),
              "kv_cache: the state at ", pos, " has ", kept_bytes(pos, window), " bytes, not ",
              out.size());
  DeviceBytes bytes(out, options_.device);
  std::byte* end = bytes.to_fill();
  for (const auto& [id, ring] : rings_)
    end = ring.memory.read(kept_rows(ring, slot, pos, window), end);
  bytes.wait();
}

void KvCache::load_kept(int64_t slot, int64_t pos, int64_t window, std::span<const std::byte> in) {
  HADAL_CHECK(static_cast<int64_t>(in.size()) == kept_bytes(pos, window), "kv_cache: the state at ",
              pos, " has ", kept_bytes(pos, window), " bytes, not ", in.size());
  DeviceBytes bytes(in, options_.device);
  const std::byte* end = bytes.filled();
  for (auto& [id, ring] : rings_) end = ring.memory.write(kept_rows(ring, slot, pos, window), end);
  bytes.wait();
}

void KvCache::save_snapshot(int64_t slot, int64_t pos, std::span<std::byte> out) const {
  save_kept(slot, pos, window_rows(pos), out);
}

void KvCache::load_snapshot(int64_t slot, int64_t pos, std::span<const std::byte> in) {
  load_kept(slot, pos, window_rows(pos), in);
}

void KvCache::save_window(int64_t slot, int64_t pos, std::span<std::byte> out) const {
  HADAL_CHECK(options_.whole_windows && pos > 0 && pos % page_tokens_ == 0,
              "kv_cache: a window ends at ", pos, ", pages have ", page_tokens_, " tokens");
  save_kept(slot, pos, page_tokens_, out);
}

void KvCache::load_window(int64_t slot, int64_t pos, std::span<const std::byte> in) {
  HADAL_CHECK(options_.whole_windows && pos > 0 && pos % page_tokens_ == 0,
              "kv_cache: a window ends at ", pos, ", pages have ", page_tokens_, " tokens");
  load_kept(slot, pos, page_tokens_, in);
}

int64_t KvCache::rebuild_tokens(int64_t layer) const {
  const int64_t layers = options_.with_mtp ? config_.n_blocks() : config_.n_layers;
  const int64_t stages = options_.with_mtp && config_.drafter.exists() ? config_.window_size : 0;
  return (layers - layer) * (config_.window_size - 1) + stages;
}

ops::Batch KvCache::begin(std::span<const engine_core::SequenceStep> steps, int64_t padded_end) {
  step_.reset();
  std::vector<int64_t> lengths, starts, ids;
  ops::StepPlaces places{.slots = {},
                         .pages = &pages_,
                         .page_tokens = page_tokens_,
                         .memory = &tables_,
                         .ratios = ratios_,
                         .ring_sizes = ring_sizes_,
                         .ids = {},
                         .padded_end = padded_end};
  std::vector<bool> used(static_cast<size_t>(num_slots()), false);
  for (const engine_core::SequenceStep& step : steps) {
    const auto length = static_cast<int64_t>(step.tokens.size());
    HADAL_CHECK(step.slot >= 0 && step.slot < num_slots() && !used[static_cast<size_t>(step.slot)],
                "kv_cache: slot ", step.slot, " of ", num_slots(), " is unknown or used twice");
    used[static_cast<size_t>(step.slot)] = true;
    const auto needed = ceil_div(step.start + length, page_tokens_);
    HADAL_CHECK(length >= 1 && step.start >= 0 && std::ssize(step.pages) >= needed,
                "kv_cache: ", length, " tokens from position ", step.start, " in ",
                step.pages.size(), " pages");
    pages_.update(step.slot, step.pages.first(static_cast<size_t>(needed)));
    places.slots.push_back(step.slot);
    lengths.push_back(length);
    starts.push_back(step.start);
    ids.insert(ids.end(), step.tokens.begin(), step.tokens.end());
  }
  places.ids = ids;
  pages_.upload();
  return step_.emplace(std::move(lengths), std::move(starts), options_.device, places);
}

at::Tensor KvCache::read_window(int64_t block,
                                const at::Tensor& slots,
                                const at::Tensor& pos) const {
  const Ring& ring = rings_.at({block, RingKind::kWindow});
  const at::Tensor numbers = slots * ring.size + pos.remainder(ring.size);
  return ops::dense_rows(ring.memory.rows().index_select(0, numbers), ring.memory.format());
}

ops::RingView KvCache::ring(int64_t block, RingKind kind) {
  const Ring& ring = rings_.at({block, kind});
  return {.rows = ring.memory.rows(),
          .slots = step_.value().slots(),
          .ring = ring.size,
          .format = ring.memory.format()};
}

ops::BlockView KvCache::append_blocks(int64_t block, BlockKind kind, const at::Tensor& rows) {
  Rows& store = blocks_.at({block, kind});
  // As in most decode steps nothing comes; or what comes stems from windows that are not right yet.
  if (rows.size(0) > 0 && !pages_are_given_) {
    const at::Tensor& to = step_.value().blocks(store.ratio).cache_rows;
    HADAL_CHECK(to.size(0) == rows.size(0), "kv_cache: ", rows.size(0), " rows for ", to.size(0),
                " blocks");
    store.memory.store(rows, at::Tensor(), to);
  }
  return block_view(store);
}

ops::BlockView KvCache::block_view(const Rows& store) const {
  return {.rows = store.memory.rows(),
          .slots = step_.value().slots(),
          .pages = pages_.table(),
          .page_blocks = store.page_blocks,
          .page_rows = store.page_blocks,
          .format = store.memory.format()};
}

model::KvAccess::BlockPlaces KvCache::block_places(int64_t block, BlockKind kind) {
  const Rows& store = blocks_.at({block, kind});
  return {
      .view = block_view(store),
      .numbers = pages_are_given_ ? at::Tensor() : step_.value().blocks(store.ratio).cache_rows};
}

const ops::RingWrites* KvCache::ring_places(int64_t block, RingKind kind) {
  return &step_.value().ring_writes(rings_.at({block, kind}).size);
}

void KvCache::commit(int64_t block, RingKind kind, const at::Tensor& rows) {
  Ring& ring = rings_.at({block, kind});
  const ops::RingWrites& writes = step_.value().ring_writes(ring.size);
  ring.memory.store(rows, writes.from, writes.to);
}

}  // namespace hadal::engine
