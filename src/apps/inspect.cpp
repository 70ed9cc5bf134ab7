// hadal inspect: what a checkpoint or a config holds.
#include <cstdio>
#include <memory>
#include <optional>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "apps/effort_choice.h"
#include "base/check.h"
#include "base/json.h"
#include "checkpoint/names.h"
#include "checkpoint/official.h"
#include "checkpoint/weight_checks.h"
#include "model/config.h"

namespace hadal::apps {
namespace {

using checkpoint::Census;
using checkpoint::Count;
using checkpoint::Storage;

struct InspectFlags {
  std::string folder, config;
  bool json = false, quick = false;
};

/// What only a folder tells: how its tensors are called, and its levels of reasoning effort.
struct FolderFacts {
  std::string naming, effort_levels, effort_reason;
};

/// "69,187".
std::string grouped(int64_t value) {
  std::string text = std::to_string(value);
  for (int64_t at = static_cast<int64_t>(text.size()) - 3; at > 0; at -= 3)
    text.insert(static_cast<size_t>(at), ",");
  return text;
}

/// "1,573.0" for 1572997201763 with one decimal.
std::string billions(int64_t value, int decimals) {
  const int64_t scale = decimals == 1 ? 10 : 100;
  const int64_t units = 1'000'000'000 / scale;
  const int64_t rounded = (value + units / 2) / units;
  const std::string fraction = std::to_string(scale + rounded % scale).substr(1);
  return grouped(rounded / scale) + "." + fraction;
}

const char* storage_name(Storage storage) {
  constexpr const char* kNames[] = {"FP8, experts FP4", "FP8", "FP8 with F32 scales", "BF16"};
  return kNames[static_cast<int>(storage)];
}

void print_count(const char* name, const Count& count) {
  if (count.tensors == 0) return;
  std::printf("  %-16s %10s %22s %20s\n", name, grouped(count.tensors).c_str(),
              grouped(count.parameters).c_str(), grouped(count.bytes).c_str());
}

void print_table(const model::ModelConfig& config,
                 const Census& census,
                 Storage storage,
                 const std::optional<FolderFacts>& facts) {
  int kinds[3] = {};
  for (int64_t layer = 0; layer < config.n_layers; ++layer)
    ++kinds[static_cast<int>(config.kind(layer))];
  std::printf("%lld layers (%d window, %d CSA, %d HCA), %lld MTP; dim %lld, %lld heads of %lld; ",
              static_cast<long long>(config.n_layers), kinds[0], kinds[1], kinds[2],
              static_cast<long long>(config.n_mtp_layers), static_cast<long long>(config.dim),
              static_cast<long long>(config.n_heads), static_cast<long long>(config.head_dim));
  std::printf("%lld of %lld experts; storage %s\n",
              static_cast<long long>(config.n_activated_experts),
              static_cast<long long>(config.n_routed_experts), storage_name(storage));
  const model::DsparkConfig& drafter = config.drafter;
  if (drafter.exists())
    std::printf("DSpark drafter: %lld stages, blocks of %lld tokens\n",
                static_cast<long long>(drafter.n_stages),
                static_cast<long long>(drafter.block_size));
  if (facts)
    std::printf("%s; reasoning effort as in %s (%s)\n", facts->naming.c_str(),
                facts->effort_levels.c_str(), facts->effort_reason.c_str());
  std::printf("\n");
  std::printf("  %-16s %10s %22s %20s\n", "part", "tensors", "parameters", "bytes");
  for (int part = 0; part < checkpoint::kNumParts; ++part)
    print_count(checkpoint::part_name(static_cast<checkpoint::Part>(part)), census.main[part]);
  print_count("main model", census.main_total());
  print_count(drafter.exists() ? "drafter" : "MTP block", census.mtp_total());
  const Count total = census.total();
  std::printf("\n%s tensors, %s bytes\n", grouped(total.tensors).c_str(),
              grouped(total.bytes).c_str());
  // Models beyond a trillion are spoken of with one decimal.
  const int64_t main_parameters = census.main_total().parameters;
  const int decimals = main_parameters >= 1'000'000'000'000 ? 1 : 2;
  if (main_parameters < 1'000'000'000) {
    const auto millions = [](int64_t count) { return static_cast<double>(count) / 1e6; };
    std::printf("%.2f M parameters + %.2f M MTP\n", millions(main_parameters),
                millions(census.mtp_total().parameters));
    std::printf("%.2f M active per token, %.2f M without the embedding\n", millions(census.active),
                millions(census.active_without_embedding));
    return;
  }
  std::printf("%s B parameters + %s B MTP\n", billions(main_parameters, decimals).c_str(),
              billions(census.mtp_total().parameters, decimals).c_str());
  std::printf("%.2f B active per token, %.2f B without the embedding\n",
              static_cast<double>(census.active) / 1e9,
              static_cast<double>(census.active_without_embedding) / 1e9);
}

void write_count(JsonWriter& out, const char* name, const Count& count) {
  out.key(name).begin_object().field("tensors", count.tensors);
  out.field("parameters", count.parameters).field("bytes", count.bytes).end_object();
}

void print_json(const model::ModelConfig& config,
                const Census& census,
                Storage storage,
                const std::optional<FolderFacts>& facts) {
  JsonWriter out;
  out.begin_object().field("layers", config.n_layers).field("mtp_layers", config.n_mtp_layers);
  if (config.drafter.exists())
    out.field("drafter_stages", config.drafter.n_stages)
        .field("drafter_block_size", config.drafter.block_size);
  if (facts)
    out.field("naming", facts->naming)
        .field("effort_levels", facts->effort_levels)
        .field("effort_levels_reason", facts->effort_reason);
  out.field("storage", storage_name(storage)).key("parts").begin_object();
  for (int part = 0; part < checkpoint::kNumParts; ++part)
    write_count(out, checkpoint::part_name(static_cast<checkpoint::Part>(part)), census.main[part]);
  out.end_object();
  write_count(out, "main", census.main_total());
  write_count(out, "mtp", census.mtp_total());
  write_count(out, "total", census.total());
  out.field("active", census.active);
  out.field("active_without_embedding", census.active_without_embedding).end_object();
  std::fputs(out.str().c_str(), stdout);
}

int run(const InspectFlags& options) {
  HADAL_INPUT_CHECK(options.folder.empty() != options.config.empty(),
                    "inspect: give a folder or --config FILE, one of the two");
  model::ModelConfig config;
  Storage storage;
  std::optional<FolderFacts> facts;
  if (options.folder.empty()) {
    config = model::load_config(options.config);
    storage = checkpoint::storage_of(config);
  } else {
    const auto files = checkpoint::OfficialCheckpoint::open(options.folder);
    config = files.config();
    storage = files.storage();
    if (!options.quick) checkpoint::check_weights(files);
    const EffortChoice effort = choose_effort_levels(options.folder, config, "");
    facts = FolderFacts{naming_name(files.naming()), text::effort_levels_name(effort.levels),
                        effort.reason};
  }
  const Census census = checkpoint::take_census(config, storage);
  options.json ? print_json(config, census, storage, facts)
               : print_table(config, census, storage, facts);
  return 0;
}

}  // namespace

std::function<int()> define_inspect(CLI::App& app) {
  auto options = std::make_shared<InspectFlags>();  // outlives define(), shared with the parser
  app.add_option("DIR", options->folder, "checkpoint folder; its files are checked");
  app.add_option("--config", options->config, "a config.json alone");
  app.add_flag("--quick", options->quick,
               "do not read the weights: no search for NaN, zero matrices and the like");
  app.add_flag("--json", options->json, "print JSON");
  return [options] { return run(*options); };
}

}  // namespace hadal::apps
