// One declaration (model/describe.h) yields the model's parameters, the order in which they are
// visited, and the table of a checkpoint's tensors.
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/hash.h"
#include "checkpoint/names.h"
#include "model/presets.h"
#include "model/transformer.h"
#include "testing/tiny_model.h"

namespace hadal::checkpoint {
namespace {

std::string shape_of(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape) text += concat(" ", size);
  return text;
}

std::map<std::string, model::ModelConfig> configs() {
  model::ModelConfig released = testing::small_config();
  released.quantized = true;
  released.expert_dtype = model::ExpertDtype::kFp4;
  model::ModelConfig no_mtp = testing::tiny_config();
  no_mtp.n_mtp_layers = 0;
  no_mtp.compress_ratios.pop_back();
  model::ModelConfig drafter = no_mtp;
  drafter.drafter = {.n_stages = 3,
                     .block_size = 4,
                     .noise_token_id = 1,
                     .markov_rank = 16,
                     .target_layers = {0, 2, 4}};
  return {{"flash", model::deepseek_v4_flash()},
          {"pro", model::deepseek_v4_pro()},
          {"tiny", testing::tiny_config()},
          {"nano", testing::nano_config()},
          {"released", released},
          {"no-mtp", no_mtp},
          {"drafter", drafter}};
}

/// Digests of the table and of the visited parameters before there was one declaration: files and
/// optimizer states of all builds have the same order.
TEST(Declaration, OrdersAreThoseOfEveryBuild) {
  struct Digests {
    uint64_t table, visited;
  };
  const std::map<std::string, Digests> recorded = {
      {"drafter", {0xd40f663e38d33d27U, 0xe019224d8076000cU}},
      {"flash", {0xf7c7a0bde7de41b3U, 0xb974307686ab45d7U}},
      {"nano", {0xdfb7c15b5b01944dU, 0x2b9ad9b64fedc4b6U}},
      {"no-mtp", {0x152041c8b09c30d3U, 0xf5cf502cc34d9b49U}},
      {"pro", {0xdc68e5547c11f780U, 0xaa87bd99724e2175U}},
      {"released", {0xe903d31e7b275fa8U, 0x47796f4b70dadee7U}},
      {"tiny", {0x3c4aef6af67ff4faU, 0x962dc7c5c077e19dU}},
  };
  for (const auto& [name, config] : configs()) {
    std::string table, visited;
    for (const TensorSpec& spec : tensor_table(config)) {
      table += concat(spec.name, " ", static_cast<int>(spec.role), " ", static_cast<int>(spec.part),
                      " ", spec.block, shape_of(spec.shape), " ", spec.trained, "\n");
    }
    const model::Transformer model(config);
    model.visit([&](const model::Parameter& p) {
      visited += concat(p.name, " ", static_cast<int>(p.kind), " ", static_cast<int>(p.role), " ",
                        static_cast<int>(p.storage), shape_of(p.shape), " ", p.units, "\n");
    });
    EXPECT_EQ(fnv1a64(table), recorded.at(name).table) << name << "\n" << table.substr(0, 2000);
    EXPECT_EQ(fnv1a64(visited), recorded.at(name).visited) << name;
  }
}

/// A tensor of the table under its parameter's name, whose stack it is one matrix of.
std::string stacked_name(const std::string& name) {
  const std::string experts = ".experts.";
  const size_t at = name.find(experts);
  if (at == std::string::npos) return name;
  const size_t first = at + experts.size(), last = name.find('.', first);
  return concat(name.substr(0, first), "*", name.substr(last));
}

/// Parameters, visitor and table name the same tensors with the same shapes, for every preset and
/// every kind of layer.
TEST(Declaration, ListsAgree) {
  for (const auto& [name, config] : configs()) {
    const model::Transformer model(config);
    std::map<std::string, std::vector<int64_t>> visited, table;
    std::map<std::string, int64_t> matrices;
    model.visit([&](const model::Parameter& p) {
      EXPECT_TRUE(visited.emplace(p.name, p.shape).second) << p.name << " is visited twice";
      EXPECT_FALSE(p.value.defined() || p.weight.defined()) << p.name;
    });
    for (const TensorSpec& spec : tensor_table(config)) {
      std::vector<int64_t> shape = spec.shape;
      const std::string stacked = stacked_name(spec.name);
      if (stacked != spec.name) shape.insert(shape.begin(), ++matrices[stacked]);
      table[stacked] = shape;
    }
    EXPECT_EQ(visited, table) << name;
  }
}

/// The parameters themselves: every member of every part is declared, none twice.
TEST(Declaration, EveryMemberIsDeclaredOnce) {
  struct Count : model::FieldVisitor {
    void field(model::Parameter& parameter, const model::Field&) override { ++times[&parameter]; }
    std::map<const model::Parameter*, int> times;
  };
  model::ModelConfig config = testing::tiny_config();
  // Of both ways to draft, as no model has them.
  config.drafter = {.n_stages = 3,
                    .block_size = 4,
                    .noise_token_id = 1,
                    .markov_rank = 16,
                    .target_layers = {0, 2, 4}};
  model::ModelParameters parameters = model::declare(config);
  Count count;
  model::describe(config, parameters, count);
  for (const auto& [parameter, times] : count.times) EXPECT_EQ(times, 1) << parameter->name;
  // Members of a structure are counted by its size, so that one that is forgotten is seen.
  const auto members = [](size_t bytes) { return bytes / sizeof(model::Parameter); };
  int64_t expected = static_cast<int64_t>(
      members(sizeof(model::ModelParameters) - sizeof(model::ModelParameters::blocks) -
              sizeof(model::ModelParameters::mtp) - sizeof(model::ModelParameters::drafter)));
  const auto block_members = [&](int64_t block) {
    const int64_t ratio = config.ratio(block);
    size_t n = 2 + 2 * members(sizeof(model::HyperConnection));
    n += members(sizeof(model::Attention) - sizeof(std::optional<model::Compressor>) -
                 sizeof(std::optional<model::Indexer>));
    if (ratio > 0) n += members(sizeof(model::Compressor));
    if (ratio == 4) n += members(sizeof(model::Indexer));
    // One of the gate's bias and its table.
    n += members(sizeof(model::Moe) - 2 * sizeof(std::optional<model::Parameter>)) + 1;
    return static_cast<int64_t>(n);
  };
  for (int64_t block = 0; block < config.n_drafting_blocks(); ++block)
    expected += block_members(block);
  expected += static_cast<int64_t>(members(sizeof(model::DrafterStage) - sizeof(model::Block)));
  expected += static_cast<int64_t>(members(sizeof(model::Mtp) - sizeof(model::Block)));
  EXPECT_EQ(static_cast<int64_t>(count.times.size()), expected);
}

}  // namespace
}  // namespace hadal::checkpoint
