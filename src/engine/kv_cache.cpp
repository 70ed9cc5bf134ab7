#include "engine/kv_cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>

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

constexpr size_t kAlignment = 64;  // a cache line, as ATen's own memory

/// Zeros that the system gives memory to when they are first written: a cache may be as large as
/// the longest context and costs what is used of it.
at::Tensor allocate(int64_t rows, int64_t width, const RowFormat& format, at::ScalarType dense) {
  const at::ScalarType type = format.packed() ? at::kByte : dense;
  const int64_t columns = format.packed() ? format.bytes() : width;
  const auto bytes =
      static_cast<size_t>(rows * columns) * static_cast<size_t>(c10::elementSize(type));
  size_t space = bytes + kAlignment;
  void* const memory = std::calloc(space, 1);
  HADAL_CHECK(memory != nullptr, "kv_cache: no memory of ", bytes, " bytes");
  void* first = memory;
  std::align(kAlignment, bytes, first, space);
  return at::from_blob(
      first, {rows, columns}, [memory](void*) { std::free(memory); }, type);
}

std::byte* bytes_of(const at::Tensor& x) { return static_cast<std::byte*>(x.mutable_data_ptr()); }

}  // namespace

int64_t page_tokens_of(const ModelConfig& config) {
  int64_t unit = 1;
  for (const int64_t ratio : config.compress_ratios) {
    if (ratio > 0) unit = std::lcm(unit, ratio);
  }
  return align_up(int64_t{256}, unit);
}

KvCache::KvCache(const ModelConfig& config, const KvCacheOptions& options)
    : config_(config), options_(options), page_tokens_(page_tokens_of(config)) {
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
    rings_[{block, kind}] = {.rows = at::zeros({slots * size, overlap * width}, at::kFloat),
                             .size = size,
                             .overlap = overlap - 1,
                             .ratio = ratio,
                             .format = {}};
  };
  const auto add_blocks = [&](int64_t block, BlockKind kind, const RowFormat& format) {
    const int64_t ratio = config.ratio(block), page_blocks = page_tokens_ / ratio;
    blocks_[{block, kind}] = {
        .rows = allocate(options.num_pages * page_blocks, format.width, format, dense),
        .page_blocks = page_blocks,
        .ratio = ratio,
        .format = format};
  };
  const int64_t blocks = options.with_mtp ? config.n_blocks() : config.n_layers;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t size = config.window_size + options.slack;
    rings_[{block, RingKind::kWindow}] = {
        .rows = allocate(slots * size, config.head_dim, latent, dense),
        .size = size,
        .overlap = -1,
        .ratio = 0,
        .format = latent};
    if (config.ratio(block) == 0) continue;
    add_inputs(block, RingKind::kKv, config.head_dim);
    add_inputs(block, RingKind::kScore, config.head_dim);
    add_blocks(block, BlockKind::kCompressed, latent);
    if (config.kind(block) != model::LayerKind::kCsa) continue;
    add_inputs(block, RingKind::kIndexKv, config.index_head_dim);
    add_inputs(block, RingKind::kIndexScore, config.index_head_dim);
    add_blocks(block, BlockKind::kIndexKeys, key);
  }
}

int64_t KvCache::page_bytes() const {
  int64_t bytes = 0;
  for (const auto& [id, rows] : blocks_) bytes += rows.page_bytes();
  return bytes;
}

int64_t KvCache::state_bytes() const {
  int64_t bytes = 0;
  for (const auto& [id, ring] : rings_) bytes += ring.size * ring.row_bytes();
  return bytes;
}

int64_t KvCache::allocated_bytes() const {
  int64_t bytes = 0;
  for (const auto& [id, rows] : blocks_) bytes += static_cast<int64_t>(rows.rows.nbytes());
  for (const auto& [id, ring] : rings_) bytes += static_cast<int64_t>(ring.rows.nbytes());
  return bytes;
}

int64_t KvCache::Ring::kept(int64_t pos, int64_t window) const {
  return std::min(pos, overlap < 0 ? window : overlap * ratio + pos % ratio);
}

int64_t KvCache::snapshot_bytes(int64_t pos) const {
  int64_t bytes = 0;
  for (const auto& [id, ring] : rings_)
    bytes += ring.kept(pos, config_.window_size) * ring.row_bytes();
  return bytes;
}

void KvCache::copy_page(int64_t from, int64_t to) {
  for (const auto& [id, rows] : blocks_) {
    std::byte* data = bytes_of(rows.rows);
    const int64_t bytes = rows.page_bytes();
    std::memcpy(data + to * bytes, data + from * bytes, static_cast<size_t>(bytes));
  }
}

void KvCache::read_page(int64_t page, std::span<std::byte> out) const {
  HADAL_CHECK(static_cast<int64_t>(out.size()) == page_bytes(), "kv_cache: a page has ",
              page_bytes(), " bytes, not ", out.size());
  for (const auto& [id, rows] : blocks_) {
    const auto bytes = static_cast<size_t>(rows.page_bytes());
    std::memcpy(out.data(), bytes_of(rows.rows) + page * rows.page_bytes(), bytes);
    out = out.subspan(bytes);
  }
}

void KvCache::write_page(int64_t page, std::span<const std::byte> in) {
  HADAL_CHECK(static_cast<int64_t>(in.size()) == page_bytes(), "kv_cache: a page has ",
              page_bytes(), " bytes, not ", in.size());
  for (const auto& [id, rows] : blocks_) {
    const auto bytes = static_cast<size_t>(rows.page_bytes());
    std::memcpy(bytes_of(rows.rows) + page * rows.page_bytes(), in.data(), bytes);
    in = in.subspan(bytes);
  }
}

/// visit(row in memory, bytes) for every row of a snapshot, in its order.
template <typename Visit>
void KvCache::visit_snapshot(int64_t slot, int64_t pos, Visit&& visit) const {
  for (const auto& [id, ring] : rings_) {
    std::byte* data = bytes_of(ring.rows);
    for (int64_t p = pos - ring.kept(pos, config_.window_size); p < pos; ++p)
      visit(data + (slot * ring.size + p % ring.size) * ring.row_bytes(),
            static_cast<size_t>(ring.row_bytes()));
  }
}

void KvCache::save_snapshot(int64_t slot, int64_t pos, std::span<std::byte> out) const {
  HADAL_CHECK(static_cast<int64_t>(out.size()) == snapshot_bytes(pos), "kv_cache: a snapshot at ",
              pos, " has ", snapshot_bytes(pos), " bytes, not ", out.size());
  visit_snapshot(slot, pos, [&](const std::byte* row, size_t bytes) {
    std::memcpy(out.data(), row, bytes);
    out = out.subspan(bytes);
  });
}

void KvCache::load_snapshot(int64_t slot, int64_t pos, std::span<const std::byte> in) {
  HADAL_CHECK(static_cast<int64_t>(in.size()) == snapshot_bytes(pos), "kv_cache: a snapshot at ",
              pos, " has ", snapshot_bytes(pos), " bytes, not ", in.size());
  visit_snapshot(slot, pos, [&](std::byte* row, size_t bytes) {
    std::memcpy(row, in.data(), bytes);
    in = in.subspan(bytes);
  });
}

int64_t KvCache::rebuild_tokens() const {
  const int64_t layers = options_.with_mtp ? config_.n_blocks() : config_.n_layers;
  return layers * (config_.window_size - 1);
}

void KvCache::rebuild(int64_t slot,
                      std::span<const int64_t> tokens,
                      std::span<const int64_t> pages) {
  rebuild_from(slot, tokens, pages, rebuild_tokens());
}

void KvCache::rebuild_from(int64_t slot,
                           std::span<const int64_t> tokens,
                           std::span<const int64_t> pages,
                           int64_t last) {
  HADAL_CHECK(rerun_, "kv_cache: no runner to rebuild a state with");
  constexpr int64_t kChunk = 512;
  const auto end = static_cast<int64_t>(tokens.size());
  HADAL_CHECK(end % page_tokens_ == 0, "kv_cache: a state is rebuilt at page borders, not at ",
              end);
  struct Given {
    bool& flag;
    explicit Given(bool& f) : flag(f) { flag = true; }
    ~Given() { flag = false; }
  } given(pages_are_given_);
  for (int64_t start = std::max<int64_t>(0, end - last); start < end;) {
    const int64_t count = std::min(kChunk, end - start);
    rerun_({.slot = slot,
            .start = start,
            .tokens = tokens.subspan(static_cast<size_t>(start), static_cast<size_t>(count)),
            .pages = pages,
            .num_logits = 0});
    start += count;
  }
}

ops::Batch KvCache::begin(std::span<const SequenceStep> steps) {
  active_.clear();
  std::vector<int64_t> lengths, starts;
  std::vector<bool> used(static_cast<size_t>(num_slots()), false);
  for (const SequenceStep& step : steps) {
    const auto length = static_cast<int64_t>(step.tokens.size());
    HADAL_CHECK(step.slot >= 0 && step.slot < num_slots() && !used[static_cast<size_t>(step.slot)],
                "kv_cache: slot ", step.slot, " of ", num_slots(), " is unknown or used twice");
    used[static_cast<size_t>(step.slot)] = true;
    const auto needed = ceil_div(step.start + length, page_tokens_);
    HADAL_CHECK(length >= 1 && step.start >= 0 && static_cast<int64_t>(step.pages.size()) >= needed,
                "kv_cache: ", length, " tokens from position ", step.start, " in ",
                step.pages.size(), " pages");
    for (const int64_t page : step.pages) {
      HADAL_CHECK(page >= 0 && page < num_pages(), "kv_cache: page ", page, " of ", num_pages());
    }
    active_.push_back({.slot = step.slot,
                       .start = step.start,
                       .length = length,
                       .pages = {step.pages.begin(), step.pages.begin() + needed}});
    lengths.push_back(length);
    starts.push_back(step.start);
  }
  return ops::Batch(lengths, starts, at::kCPU);
}

ops::RingView KvCache::ring(int64_t block, RingKind kind) {
  const Ring& ring = rings_.at({block, kind});
  ops::RingView view{.rows = ring.rows, .first_row = {}, .ring = ring.size, .format = ring.format};
  for (const Active& sequence : active_) view.first_row.push_back(sequence.slot * ring.size);
  return view;
}

ops::BlockView KvCache::append_blocks(int64_t block, BlockKind kind, const at::Tensor& rows) {
  const Rows& store = blocks_.at({block, kind});
  ops::BlockView view{.rows = store.rows,
                      .page_start = {},
                      .page_blocks = store.page_blocks,
                      .format = store.format};
  for (const Active& sequence : active_) {
    auto& starts = view.page_start.emplace_back();
    for (const int64_t page : sequence.pages) starts.push_back(page * store.page_blocks);
  }
  // As in most decode steps; or what is computed here stems from windows that are not right yet.
  if (rows.size(0) == 0 || pages_are_given_) return view;
  const at::Tensor packed =
      store.format.packed() ? ops::pack_rows(rows, store.format) : rows.contiguous();
  HADAL_CHECK(packed.scalar_type() == store.rows.scalar_type(), "kv_cache: rows are ",
              packed.scalar_type(), ", stored are ", store.rows.scalar_type());
  const int64_t bytes = store.rows.size(1) * store.rows.element_size();
  int64_t next = 0;
  for (size_t seq = 0; seq < active_.size(); ++seq) {
    const Active& sequence = active_[seq];
    const int64_t end = (sequence.start + sequence.length) / store.ratio;
    for (int64_t number = sequence.start / store.ratio; number < end; ++number, ++next) {
      std::memcpy(bytes_of(store.rows) + view.row(static_cast<int64_t>(seq), number) * bytes,
                  bytes_of(packed) + next * bytes, static_cast<size_t>(bytes));
    }
  }
  HADAL_CHECK(next == rows.size(0), "kv_cache: ", rows.size(0), " rows for ", next, " blocks");
  return view;
}

void KvCache::commit(int64_t block, RingKind kind, const at::Tensor& rows) {
  Ring& ring = rings_.at({block, kind});
  const at::Tensor source =
      ring.format.packed() ? rows.contiguous() : rows.to(ring.rows.scalar_type()).contiguous();
  const int64_t bytes = ring.row_bytes(), row_elements = source.size(1);
  const auto* dense = static_cast<const std::byte*>(source.const_data_ptr());
  int64_t token = 0;
  for (const Active& sequence : active_) {
    for (int64_t t = std::max<int64_t>(0, sequence.length - ring.size); t < sequence.length; ++t) {
      const std::byte* row = dense + (token + t) * row_elements * source.element_size();
      std::byte* target = bytes_of(ring.rows) +
                          (sequence.slot * ring.size + (sequence.start + t) % ring.size) * bytes;
      if (!ring.format.packed()) {
        std::memcpy(target, row, static_cast<size_t>(bytes));
        continue;
      }
      HADAL_CHECK(ops::pack_row(reinterpret_cast<const uint16_t*>(row), ring.format,
                                reinterpret_cast<uint8_t*>(target)),
                  "kv_cache: a window row of layer ", block, " is not a rounded number");
    }
    token += sequence.length;
  }
}

}  // namespace hadal::engine
