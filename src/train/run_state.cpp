#include "train/run_state.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <memory>
#include <set>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "checkpoint/safetensors.h"

namespace hadal::train {
namespace {

namespace fs = std::filesystem;
constexpr const char* kFormat = "hadal training state 1";

/// Complete checkpoints by step, ascending. Unfinished ones carry a temporary name.
std::vector<std::pair<int64_t, std::string>> states(const std::string& out) {
  std::vector<std::pair<int64_t, std::string>> result;
  const fs::path folder = fs::path(out) / "checkpoints";
  if (!fs::is_directory(folder)) return result;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    constexpr std::string_view kPrefix = "step-";
    if (name.rfind(kPrefix, 0) != 0) continue;
    int64_t step = 0;
    const char* end = name.data() + name.size();
    const auto parsed = std::from_chars(name.data() + kPrefix.size(), end, step);
    if (parsed.ec != std::errc() || parsed.ptr != end) continue;
    result.emplace_back(step, entry.path().string());
  }
  std::sort(result.begin(), result.end());
  return result;
}

/// Every tensor of the state, in the order of the file; of it what this rank has.
std::vector<StateTensor> named_state(model::Transformer& model, const Optimizer& optimizer) {
  std::vector<StateTensor> result;
  size_t slot = 0;
  model.visit([&](model::Parameter& parameter) {
    if (slot < optimizer.slots().size() && optimizer.slots()[slot].parameter == &parameter)
      return result.push_back(optimizer.masters(slot++));
    // Moved by no gradient: every rank of its stage has it.
    if (parameter.elsewhere) {
      const auto type = parameter.kind == model::ParamKind::kHashTable ? at::kLong : at::kFloat;
      const auto options = at::TensorOptions(at::kMeta).dtype(type);
      return result.push_back({.name = parameter.name,
                               .whole = at::empty(parameter.local_shape(), options),
                               .parts = {}});
    }
    const at::Tensor value = parameter.value.detach();
    result.push_back(
        {.name = parameter.name, .whole = value.to(at::kMeta), .parts = {{0, value.view({-1})}}});
  });
  for (StateTensor& tensor : optimizer.state()) result.push_back(std::move(tensor));
  return result;
}

/// What this rank writes; what all ranks of a stage have is the first one's of them to write.
std::vector<checkpoint::NamedTensor> written_here(model::Transformer& model,
                                                  const Optimizer& optimizer,
                                                  const dist::Ranks& ranks) {
  const dist::MeshPlace place = optimizer.ownership().mesh().place(ranks.rank());
  const bool is_first = place.data == 0 && place.context == 0;
  std::set<std::string> everywhere;
  model.visit([&](const model::Parameter& parameter) {
    if (update_rule(parameter) == UpdateRule::kNone) everywhere.insert(parameter.name);
  });
  std::vector<checkpoint::NamedTensor> result;
  for (const StateTensor& state : named_state(model, optimizer)) {
    checkpoint::NamedTensor tensor{.name = state.name, .tensor = state.whole};
    if (ranks.size() == 1) {
      tensor.tensor = state.parts.at(0).values.view(state.whole.sizes());
    } else if (is_first || !everywhere.contains(state.name)) {
      for (const auto& [begin, values] : state.parts) tensor.parts.push_back({begin, values});
    }
    result.push_back(std::move(tensor));
  }
  return result;
}

/// Two lists of one length: the stage of each part, and its tokens.
StageParts parts_of(const JsonObject& json) {
  StageParts parts;
  if (!json.has("part_stages")) return parts;
  const std::vector<int64_t> stages = json.integers("part_stages", 0, 4096);
  const std::vector<int64_t> tokens = json.integers("part_tokens", 0, INT64_MAX);
  HADAL_INPUT_CHECK(stages.size() == tokens.size(), json.where("part_stages"), ": ", stages.size(),
                    " stages, but ", tokens.size(), " part_tokens");
  for (size_t i = 0; i < stages.size(); ++i) {
    parts.resize(std::max(parts.size(), static_cast<size_t>(stages[i]) + 1));
    parts[static_cast<size_t>(stages[i])].push_back(tokens[i]);
  }
  return parts;
}

}  // namespace

namespace {

std::string progress_json(const RunProgress& progress, const Optimizer& optimizer) {
  JsonWriter json;
  json.begin_object()
      .field("format", kFormat)
      .field("step", progress.step)
      .field("stage", progress.stage)
      .field("row", progress.row)
      .field("tokens", progress.tokens)
      .field("skipped_steps", progress.skipped_steps)
      .field("optimizer_steps", optimizer.num_steps());
  std::vector<int64_t> plan(progress.plan.begin(), progress.plan.end());
  json.field("plan", plan);
  std::vector<int64_t> stages, tokens;
  for (size_t stage = 0; stage < progress.parts.size(); ++stage) {
    for (const int64_t part : progress.parts[stage]) {
      stages.push_back(static_cast<int64_t>(stage));
      tokens.push_back(part);
    }
  }
  json.field("part_stages", stages).field("part_tokens", tokens).end_object();
  return json.str();
}

/// All ranks' parts of one file; whole when this returns.
void write_together(const std::string& path,
                    const std::vector<checkpoint::NamedTensor>& tensors,
                    dist::Ranks& ranks) {
  if (ranks.first()) checkpoint::create_safetensors(path, tensors);
  ranks.barrier("checkpoint: the file is there");
  HADAL_INPUT_CHECK(fs::exists(path), path, ": expected in a folder that all ranks see, not found ",
                    "by rank ", ranks.rank());
  checkpoint::fill_safetensors(path, tensors);
  ranks.barrier("checkpoint: every rank has written");
}

}  // namespace

void save_state(const std::string& out,
                const RunProgress& progress,
                int64_t keep,
                model::Transformer& model,
                Optimizer& optimizer,
                dist::Ranks& ranks) {
  const fs::path folder = fs::path(out) / "checkpoints";
  if (ranks.first()) fs::create_directories(folder);
  const std::string target = (folder / concat("step-", progress.step)).string();
  // The first rank looks, so that all do the same.
  std::unique_ptr<AtomicDirectory> directory;
  if (ranks.first() && !fs::exists(target)) directory = std::make_unique<AtomicDirectory>(target);
  const std::string temporary = ranks.broadcast(directory ? directory->temporary() : "");
  if (!temporary.empty()) {
    const auto tensors = written_here(model, optimizer, ranks);
    const std::string path = temporary + "/state.safetensors";
    ranks.size() == 1 ? checkpoint::write_safetensors(path, tensors)
                      : write_together(path, tensors, ranks);
  }
  if (!ranks.first()) return;
  if (directory) {
    write_file_atomic(temporary + "/progress.json", progress_json(progress, optimizer));
    directory->commit();
  }
  auto all = states(out);
  for (size_t i = 0; i + static_cast<size_t>(keep) < all.size(); ++i) {
    std::error_code ignored;  // an old checkpoint too many is no reason to stop
    fs::remove_all(all[i].second, ignored);
  }
}

void remove_leftovers(const std::string& out) {
  // AtomicFile and AtomicDirectory write under the name, this and six characters.
  constexpr std::string_view kMark = ".tmp-";
  for (const fs::path& folder :
       {fs::path(out), fs::path(out) / "checkpoints", fs::path(out) / "tokens"}) {
    if (!fs::is_directory(folder)) continue;
    std::vector<fs::path> leftovers;
    for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
      const std::string name = entry.path().filename().string();
      const size_t mark = name.rfind(kMark);
      if (mark != std::string::npos && mark + kMark.size() + 6 == name.size()) {
        leftovers.push_back(entry.path());
      }
    }
    for (const fs::path& path : leftovers) {
      log::info("train", "removing ", path.string(), ", which was not finished");
      std::error_code ignored;  // a leftover too many is no reason to stop
      fs::remove_all(path, ignored);
    }
  }
}

std::vector<std::string> complete_states(const std::string& out) {
  std::vector<std::string> paths;
  for (const auto& [step, path] : states(out)) paths.push_back(path);
  return paths;
}

StageParts load_parts(const std::string& folder) {
  return parts_of(JsonObject::load(folder + "/progress.json"));
}

model::Transformer open_masters(const std::string& folder, const model::ModelConfig& config) {
  const auto reader = checkpoint::TensorReader::open(folder + "/state.safetensors");
  model::Transformer model(config);
  model.visit([&](model::Parameter& parameter) { parameter.hold(reader.tensor(parameter.name)); });
  return model;
}

RunProgress load_state(const std::string& folder, model::Transformer& model, Optimizer& optimizer) {
  const JsonObject json = JsonObject::load(folder + "/progress.json");
  HADAL_INPUT_CHECK(json.string("format") == kFormat, json.where("format"), ": expected \"",
                    kFormat, "\", found \"", json.string("format"), "\"");
  RunProgress progress;
  progress.step = json.integer("step", 0, INT64_MAX);
  progress.stage = json.integer("stage", 0, INT64_MAX);
  progress.row = json.integer("row", 0, INT64_MAX);
  progress.tokens = json.integer("tokens", 0, INT64_MAX);
  progress.skipped_steps = json.integer("skipped_steps", 0, INT64_MAX);
  const int64_t optimizer_steps = json.integer("optimizer_steps", 0, INT64_MAX);
  for (const int64_t value : json.integers("plan", INT64_MIN, INT64_MAX)) {
    progress.plan.push_back(static_cast<uint64_t>(value));
  }
  progress.parts = parts_of(json);
  const auto reader = checkpoint::TensorReader::open(folder + "/state.safetensors");
  const auto targets = named_state(model, optimizer);
  for (const StateTensor& target : targets) {
    HADAL_INPUT_CHECK(reader.has(target.name), reader.path(), ": no tensor ", target.name);
    const at::Tensor stored = reader.tensor(target.name);
    HADAL_INPUT_CHECK(stored.sizes() == target.whole.sizes() &&
                          stored.scalar_type() == target.whole.scalar_type(),
                      reader.path(), ": ", target.name, " is ", stored.scalar_type(), " ",
                      stored.sizes(), ", expected ", target.whole.scalar_type(), " ",
                      target.whole.sizes());
  }
  HADAL_INPUT_CHECK(reader.names().size() == targets.size(), reader.path(), ": ",
                    reader.names().size(), " tensors, expected ", targets.size());
  const at::NoGradGuard no_grad;
  // Values are FP32 and whole here, so masters are a part of them.
  model.visit([&](model::Parameter& parameter) {
    if (parameter.elsewhere) return;
    HADAL_CHECK(parameter.value.scalar_type() != at::kBFloat16, "load_state: ", parameter.name,
                " is rounded already");
    parameter.value.detach().copy_(reader.tensor(parameter.name));
  });
  for (const StateTensor& moments : optimizer.state()) {
    const at::Tensor stored = reader.tensor(moments.name).view({-1});
    for (const auto& [begin, values] : moments.parts)
      values.copy_(stored.narrow(0, begin, values.numel()));
  }
  optimizer.set_num_steps(optimizer_steps);
  return progress;
}

}  // namespace hadal::train
