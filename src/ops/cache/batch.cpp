#include "ops/cache/batch.h"

#include <algorithm>
#include <numeric>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/math.h"

namespace hadal::ops {
namespace {

/// A table on the device: in the memory that was given for it, or in its own.
at::Tensor make_table(const TableMemory::Name& name,
                      std::span<const int64_t> values,
                      at::ScalarType type,
                      at::Device device,
                      TableMemory* memory) {
  return memory != nullptr ? memory->place(name, values, type)
                           : TableMemory::make(values, type, device);
}

}  // namespace

Batch::Batch(std::vector<int64_t> lengths,
             std::vector<int64_t> starts,
             at::Device device,
             const StepPlaces& places)
    : plan_(std::make_shared<Plan>()) {
  HADAL_CHECK(!lengths.empty() && lengths.size() == starts.size(), "batch: ", lengths.size(),
              " lengths for ", starts.size(), " starts");
  HADAL_CHECK(places.slots.empty() || places.slots.size() == lengths.size(),
              "batch: ", places.slots.size(), " slots for ", lengths.size(), " sequences");
  Plan& plan = *plan_;
  plan.starts = std::move(starts);
  plan.device = device;
  plan.pages = places.pages;
  plan.page_tokens = places.page_tokens;
  plan.host_slots = places.slots;
  if (plan.host_slots.empty()) {
    plan.host_slots.resize(lengths.size());
    std::iota(plan.host_slots.begin(), plan.host_slots.end(), int64_t{0});
  }
  plan.cu_seqlens.push_back(0);
  std::vector<int64_t> seq;
  for (size_t s = 0; s < lengths.size(); ++s) {
    const int64_t start = plan.starts[s];
    HADAL_CHECK(lengths[s] >= 1 && start >= 0, "batch: sequence ", s, " has length ", lengths[s],
                " from position ", start);
    plan.cu_seqlens.push_back(plan.cu_seqlens.back() + lengths[s]);
    plan.max_end_pos = std::max(plan.max_end_pos, start + lengths[s]);
    for (int64_t t = 0; t < lengths[s]; ++t) {
      plan.host_pos.push_back(start + t);
      seq.push_back(static_cast<int64_t>(s));
    }
  }
  if (places.padded_end > 0) {
    HADAL_CHECK(plan.max_end_pos <= places.padded_end && places.pages != nullptr,
                "batch: a step that ends at ", plan.max_end_pos, " padded to ", places.padded_end,
                places.pages == nullptr ? ", without pages" : "");
    plan.max_end_pos = places.padded_end;
    plan.padded = true;
  }
  HADAL_CHECK(places.ids.empty() || std::ssize(places.ids) == num_tokens(),
              "batch: ", places.ids.size(), " ids for ", num_tokens(), " tokens");
  TableMemory* const memory = places.memory;
  if (memory != nullptr) memory->begin();
  plan.pos = make_table({"pos", 0}, plan.host_pos, at::kLong, device, memory);
  plan.seq = make_table({"seq", 0}, seq, at::kLong, device, memory);
  plan.slots = make_table({"slots", 0}, plan.host_slots, at::kInt, device, memory);
  std::vector<int64_t> token_slots;
  token_slots.reserve(seq.size());
  for (const int64_t s : seq) token_slots.push_back(plan.host_slots[static_cast<size_t>(s)]);
  plan.token_slots = make_table({"token_slots", 0}, token_slots, at::kInt, device, memory);
  if (!places.ids.empty()) plan.ids = make_table({"ids", 0}, places.ids, at::kLong, device, memory);
  // While a step is recorded nothing can be sent.
  if (memory != nullptr)
    plan.device_cu_seqlens =
        make_table({"cu_seqlens", 0}, plan.cu_seqlens, at::kInt, device, memory);
  for (const int64_t ratio : places.ratios) {
    plan_blocks(ratio, memory);
    plan_visible(ratio, memory);
  }
  for (const int64_t size : places.ring_sizes) plan_ring_writes(size, memory);
  if (memory != nullptr) memory->upload();
}

const BlockPlan& Batch::blocks(int64_t ratio) const { return plan_blocks(ratio, nullptr); }

const BlockPlan& Batch::plan_blocks(int64_t ratio, TableMemory* memory) const {
  HADAL_CHECK(ratio > 0, "batch: blocks of ratio ", ratio);
  const auto found = plan_->blocks.find(ratio);
  if (found != plan_->blocks.end()) return found->second;
  const bool paged = plan_->pages != nullptr;
  HADAL_CHECK(!paged || plan_->page_tokens % ratio == 0, "batch: pages of ", plan_->page_tokens,
              " tokens for blocks of ", ratio);
  BlockPlan plan;
  plan.ratio = ratio;
  plan.cu_blocks.push_back(0);
  std::vector<int64_t> block_pos, seqs, previous, rows, cache_rows;
  for (int64_t s = 0; s < num_seqs(); ++s) {
    const int64_t first = start(s) / ratio, last = (start(s) + length(s)) / ratio;
    plan.first_block.push_back(first);
    plan.cu_blocks.push_back(plan.cu_blocks.back() + last - first);
    for (int64_t block = first; block < last; ++block) {
      previous.push_back(block == first ? s : num_seqs() + std::ssize(block_pos) - 1);
      block_pos.push_back(block * ratio);
      seqs.push_back(s);
      for (int64_t pos = block * ratio; pos < (block + 1) * ratio; ++pos) {
        rows.push_back(pos >= start(s) ? begin(s) + pos - start(s) : -1 - pos);
        plan.inside &= pos >= start(s);
      }
      if (!paged) continue;
      const int64_t page_blocks = plan_->page_tokens / ratio;
      const int64_t page =
          plan_->pages->page(plan_->host_slots[static_cast<size_t>(s)], block / page_blocks);
      cache_rows.push_back(page * page_blocks + block % page_blocks);
    }
    if (last > first) plan.max_pos = std::max(plan.max_pos, (last - 1) * ratio);
    if (plan_->padded) plan.num_absent += ceil_div(length(s), ratio) - (last - first);
  }
  if (plan_->padded) {
    // As far as any step of this kind gets.
    plan.max_pos = plan_->max_end_pos - 1;
    plan.inside = false;
    const int64_t behind = plan_->pages->num_pages() * (plan_->page_tokens / ratio);
    const auto absent = static_cast<size_t>(plan.num_absent);
    block_pos.resize(block_pos.size() + absent, 0);
    seqs.resize(seqs.size() + absent, -1);
    previous.resize(previous.size() + absent, 0);
    cache_rows.resize(cache_rows.size() + absent, behind);
    rows.resize(rows.size() + absent * static_cast<size_t>(ratio), -1);
  }
  const auto table = [&](const char* name, const std::vector<int64_t>& values,
                         at::ScalarType type) {
    return make_table({name, ratio}, values, type, plan_->device, memory);
  };
  plan.pos = table("block_pos", block_pos, at::kLong);
  plan.seq = table("block_seq", seqs, at::kLong);
  plan.rows = table("block_rows", rows, at::kLong);
  plan.previous = table("previous", previous, at::kLong);
  plan.device_cu_blocks = table("cu_blocks", plan.cu_blocks, at::kInt);
  std::vector<int64_t> numbers(static_cast<size_t>(num_seqs()));
  std::iota(numbers.begin(), numbers.end(), int64_t{0});
  plan.numbers = table("numbers", numbers, at::kInt);
  if (paged) plan.cache_rows = table("cache_rows", cache_rows, at::kLong);
  return plan_->blocks.emplace(ratio, std::move(plan)).first->second;
}

const at::Tensor& Batch::block_places(int64_t ratio) const {
  at::Tensor& table = plan_->block_places[ratio];
  if (!table.defined()) {
    HADAL_CHECK(!plan_->padded, "batch: places of blocks of a padded step");
    std::vector<int64_t> places;
    for (int64_t s = 0; s < num_seqs(); ++s) {
      for (int64_t block = start(s) / ratio; block < (start(s) + length(s)) / ratio; ++block)
        places.push_back(begin(s) + (block + 1) * ratio - 1 - start(s));
    }
    table = at::tensor(places, at::kLong);
  }
  return table;
}

const RingWrites& Batch::ring_writes(int64_t size) const { return plan_ring_writes(size, nullptr); }

const RingWrites& Batch::plan_ring_writes(int64_t size, TableMemory* memory) const {
  HADAL_CHECK(size > 0, "batch: rings of ", size, " positions");
  const auto found = plan_->ring_writes.find(size);
  if (found != plan_->ring_writes.end()) return found->second;
  std::vector<int64_t> from, to;
  for (int64_t s = 0; s < num_seqs(); ++s) {
    const int64_t first = plan_->host_slots[static_cast<size_t>(s)] * size;
    for (int64_t t = std::max<int64_t>(0, length(s) - size); t < length(s); ++t) {
      from.push_back(begin(s) + t);
      to.push_back(first + (start(s) + t) % size);
    }
  }
  RingWrites writes{.from = make_table({"ring_from", size}, from, at::kLong, plan_->device, memory),
                    .to = make_table({"ring_to", size}, to, at::kLong, plan_->device, memory)};
  return plan_->ring_writes.emplace(size, std::move(writes)).first->second;
}

const at::Tensor& Batch::visible(int64_t ratio) const { return plan_visible(ratio, nullptr); }

const at::Tensor& Batch::plan_visible(int64_t ratio, TableMemory* memory) const {
  HADAL_CHECK(ratio > 0, "batch: blocks of ratio ", ratio);
  at::Tensor& table = plan_->visible[ratio];
  if (!table.defined()) {
    std::vector<int64_t> counts;
    counts.reserve(plan_->host_pos.size());
    for (const int64_t pos : plan_->host_pos) counts.push_back((pos + 1) / ratio);
    table = make_table({"visible", ratio}, counts, at::kInt, plan_->device, memory);
  }
  return table;
}

int64_t Batch::max_length() const {
  int64_t most = 0;
  for (int64_t seq = 0; seq < num_seqs(); ++seq) most = std::max(most, length(seq));
  return most;
}

bool Batch::whole() const {
  return std::all_of(plan_->starts.begin(), plan_->starts.end(),
                     [](int64_t start) { return start == 0; });
}

const at::Tensor& Batch::device_cu_seqlens() const {
  if (!plan_->device_cu_seqlens.defined()) {
    plan_->device_cu_seqlens =
        make_table({"cu_seqlens", 0}, plan_->cu_seqlens, at::kInt, plan_->device, nullptr);
  }
  return plan_->device_cu_seqlens;
}

const at::Tensor& Batch::token_tiles(int64_t size) const {
  at::Tensor& tiles = plan_->token_tiles[size];
  if (!tiles.defined()) {
    std::vector<int64_t> flat;
    for (int64_t seq = 0; seq < num_seqs(); ++seq) {
      for (int64_t token = 0; token < length(seq); token += size) {
        flat.insert(flat.end(), {begin(seq) + token, std::min(size, length(seq) - token),
                                 start(seq) + token, seq});
      }
    }
    tiles = make_table({"tiles", 0}, flat, at::kInt, plan_->device, nullptr).reshape({-1, 4});
  }
  return tiles;
}

const at::Tensor& Batch::key_tiles(int64_t size, int64_t ratio) const {
  at::Tensor& tiles = plan_->key_tiles[{size, ratio}];
  if (!tiles.defined()) {
    std::vector<int64_t> flat;
    if (ratio > 0) {
      // Blocks first: the early ones are seen by the most queries, so the longest work starts
      // first.
      const BlockPlan& plan = blocks(ratio);
      for (int64_t seq = 0; seq < num_seqs(); ++seq) {
        const int64_t first = plan.cu_blocks[static_cast<size_t>(seq)];
        const int64_t count = plan.cu_blocks[static_cast<size_t>(seq) + 1] - first;
        for (int64_t block = 0; block < count; block += size) {
          flat.insert(flat.end(), {1, block, first + block, seq});
        }
      }
    }
    for (int64_t seq = 0; seq < num_seqs(); ++seq) {
      for (int64_t token = 0; token < length(seq); token += size) {
        flat.insert(flat.end(), {0, token, begin(seq) + token, seq});
      }
    }
    tiles = make_table({"tiles", 0}, flat, at::kInt, plan_->device, nullptr).reshape({-1, 4});
  }
  return tiles;
}

BlockView step_blocks(const at::Tensor& rows, const Batch& batch, int64_t ratio) {
  HADAL_CHECK(batch.whole(),
              "batch: a sequence continues an earlier step, whose blocks are not here");
  // A line for each sequence, wherever the caches would have it.
  const BlockPlan& plan = batch.blocks(ratio);
  return {.rows = rows,
          .slots = plan.numbers,
          .pages = plan.device_cu_blocks.unsqueeze(1),
          .of_step = true};
}

}  // namespace hadal::ops
