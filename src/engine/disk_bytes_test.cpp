// What each disk policy writes and reads for the caches of a real model, in closed form
// (kv_cache_disk.md).
#include <algorithm>
#include <filesystem>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "base/math.h"
#include "engine/kv_cache.h"
#include "engine_core/disk/disk_store.h"
#include "engine_core/prefix/sequence_cache.h"
#include "testing/tiny_model.h"

namespace hadal::engine {
namespace {

using ops::Numerics;

constexpr int64_t kPages = 7, kPeriodPages = 3, kSlack = 2;

/// The closed forms, for `layers` blocks of a model.
struct Bytes {
  int64_t window_row = 0;  ///< of one position and layer
  int64_t page = 0;        ///< compressed entries and index keys of a page, all layers
  int64_t inputs = 0;      ///< compressor inputs of the block before a page's end, all layers
  int64_t rings = 0;       ///< of compressor inputs, with kSlack

  Bytes(const model::ModelConfig& config, Numerics numerics, int64_t layers, int64_t page_tokens) {
    const int64_t c = config.head_dim, r = config.rope_head_dim, ci = config.index_head_dim;
    const bool packs = numerics == Numerics::kReleased;
    const int64_t dense = numerics == Numerics::kIdeal ? 4 : 2;
    window_row = packs ? align_up((c - r) + 2 * r + (c - r) / 64, int64_t{8}) : dense * c;
    const int64_t key = packs ? ci / 2 + ci / 32 : dense * ci;
    for (int64_t layer = 0; layer < layers; ++layer) {
      const int64_t m = config.ratio(layer);
      if (m == 0) continue;
      page += page_tokens / m * window_row;
      const bool selects = config.kind(layer) == model::LayerKind::kCsa;
      const int64_t overlap = selects ? 2 : 1;
      rings += (overlap * m + kSlack) * 2 * overlap * (c + (selects ? ci : 0)) * 4;
      if (!selects) continue;
      page += page_tokens / m * key;
      inputs += m * 2 * 2 * (c + ci) * 4;  // blocks overlap by one; values and scores, FP32
    }
  }
};

std::vector<int64_t> text() {
  std::vector<int64_t> tokens(static_cast<size_t>(kPages * 256 + 100));
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int64_t>(i % 199);
  return tokens;
}

/// A prompt passes through the books page by page, as the scheduler steps; nothing is computed.
void pass(engine_core::SequenceCache& cache,
          const std::vector<int64_t>& tokens,
          engine_core::SequenceCache::Opened& opened) {
  engine_core::CachedSequence sequence;
  ASSERT_TRUE(cache.open(tokens, cache.match(tokens, true), true, sequence, opened));
  while (cache.loads(sequence)) cache.load(sequence, tokens, 3, opened);
  const auto size = static_cast<int64_t>(tokens.size());
  while (sequence.pos < size) {
    const int64_t end = std::min(size, cache.next_kept(sequence.pos));
    ASSERT_TRUE(cache.reserve(sequence, end));
    sequence.pos = end;
    cache.store_window(sequence, tokens);
    if (end == size || end % cache.snapshot_interval() == 0)
      cache.publish(sequence, tokens, engine_core::StateKind::kPage);
  }
  cache.close(sequence);
}

/// Bytes alone count here: every state is rebuilt at once.
class Rebuilds final : public engine_core::Runner {
 public:
  int64_t vocab_size() const override { return 0; }
  int64_t slack() const override { return 0; }
  Ticket launch(std::span<const engine_core::SequenceStep>) override { return 0; }
  engine_core::StepResult collect(Ticket) override { return {}; }
  std::span<const float> logits(int64_t, int64_t) const override { return {}; }
  void rewind(int64_t, int64_t) override {}
  bool can_rebuild() const override { return true; }
};

void check_policy(const model::ModelConfig& config,
                  Numerics numerics,
                  bool with_mtp,
                  engine_core::WindowPolicy policy,
                  const std::string& folder) {
  KvCache memory(config, {.numerics = numerics,
                          .num_pages = kPages + 1,
                          .num_slots = 1,
                          .slack = kSlack,
                          .with_mtp = with_mtp,
                          .whole_windows = policy == engine_core::WindowPolicy::kFull});
  Rebuilds runner;
  const int64_t page_tokens = memory.page_tokens();
  ASSERT_EQ(page_tokens, 256);
  const int64_t layers = with_mtp ? config.n_blocks() : config.n_layers;
  const Bytes bytes(config, numerics, layers, page_tokens);
  const int64_t window = page_tokens * layers * bytes.window_row + bytes.inputs;
  const int64_t snapshot = config.window_size * layers * bytes.window_row + bytes.inputs;
  const bool full = policy == engine_core::WindowPolicy::kFull,
             periodic = policy == engine_core::WindowPolicy::kPeriodic;
  EXPECT_EQ(memory.page_bytes(), bytes.page);
  const int64_t held = full ? std::max(config.window_size, page_tokens) : config.window_size;
  EXPECT_EQ(memory.state_bytes(), layers * (held + kSlack) * bytes.window_row + bytes.rings);
  EXPECT_EQ(memory.window_bytes(), full ? window : 0);
  EXPECT_EQ(memory.snapshot_bytes(3 * page_tokens), snapshot);
  EXPECT_EQ(memory.allocated_bytes(),
            memory.num_pages() * memory.page_bytes() + memory.state_bytes());

  engine_core::DiskStore store({.folder = folder,
                                .identity = "test",
                                .page_tokens = page_tokens,
                                .policy = policy,
                                .period = kPeriodPages * page_tokens,
                                .window_pages = memory.window_pages()});
  engine_core::SequenceCache cache(memory, runner, {}, &store);
  engine_core::SequenceCache::Opened opened;
  pass(cache, text(), opened);
  store.flush();
  const engine_core::DiskStoreStats written = store.stats();
  EXPECT_EQ(written.of(engine_core::RecordKind::kPage).written_bytes, kPages * bytes.page);
  EXPECT_EQ(written.of(engine_core::RecordKind::kWindow).written_bytes, full ? kPages * window : 0);
  EXPECT_EQ(written.of(engine_core::RecordKind::kSnapshot).written_bytes,
            periodic ? kPages / kPeriodPages * snapshot : 0);

  // The hit of another process.
  engine_core::SequenceCache other(memory, runner, {}, &store);
  pass(other, text(), opened);
  const int64_t found = periodic ? kPages / kPeriodPages * kPeriodPages : kPages;
  EXPECT_EQ(opened.disk_tokens, found * page_tokens);
  const engine_core::DiskStoreStats read = store.stats();
  EXPECT_EQ(read.of(engine_core::RecordKind::kPage).read_bytes, found * bytes.page);
  EXPECT_EQ(read.of(engine_core::RecordKind::kWindow).read_bytes,
            full ? memory.window_pages() * window : 0);
  EXPECT_EQ(read.of(engine_core::RecordKind::kSnapshot).read_bytes, periodic ? snapshot : 0);
  store.flush();
  EXPECT_EQ(store.stats().record_bytes_written, written.record_bytes_written) << "written twice";
}

TEST(DiskBytes, AreTheClosedFormsOfEachPolicy) {
  const std::string folder = (std::filesystem::temp_directory_path() / "hadal-disk-bytes").string();
  model::ModelConfig long_window = testing::tiny_config();
  long_window.window_size = 600;  // three pages
  for (const engine_core::WindowPolicy policy :
       {engine_core::WindowPolicy::kFull, engine_core::WindowPolicy::kPeriodic,
        engine_core::WindowPolicy::kZero}) {
    for (const auto& [config, numerics, with_mtp] :
         {std::tuple{testing::nano_config(), Numerics::kReleased, false},
          std::tuple{testing::small_config(), Numerics::kReleased, true},
          std::tuple{testing::tiny_config(), Numerics::kBf16, false},
          std::tuple{long_window, Numerics::kIdeal, true}}) {
      std::filesystem::remove_all(folder);
      check_policy(config, numerics, with_mtp, policy, folder);
      if (HasFatalFailure()) return;
    }
  }
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace hadal::engine
