#include "train/run_state.h"

#include <algorithm>
#include <charconv>
#include <filesystem>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "checkpoint/safetensors.h"
#include "train/state_copy.h"
#include "train/state_manifest.h"

namespace hadal::train {
namespace {

namespace fs = std::filesystem;

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

std::string progress_json(const RunProgress& progress, const Optimizer& optimizer) {
  JsonWriter json;
  json.begin_object()
      .field("format", kStateFormat)
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

void remove_older_states(const std::string& out, int64_t keep) {
  const auto all = states(out);
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

std::string newest_state(const std::string& out) {
  const auto all = states(out);
  return all.empty() ? "" : all.back().second;
}

std::string newest_whole_state(const std::string& out, bool set_aside) {
  const auto all = states(out);
  std::vector<std::pair<std::string, std::string>> damaged;  // and what is wrong, newest first
  for (auto state = all.rbegin(); state != all.rend(); ++state) {
    const std::string& folder = state->second;
    try {
      if (!verify_state(folder))
        log::info("train", folder, ": of an older version, has no checksums");
    } catch (const InputError& error) {
      damaged.emplace_back(folder, error.what());
      continue;
    }
    for (const auto& [newer, why] : damaged) {
      log::warn("train", newer, " is not whole (", why, "); going back to ", folder);
      if (!set_aside) continue;
      const std::string aside = newer + ".damaged";
      fs::remove_all(aside);
      fs::rename(newer, aside);
    }
    return folder;
  }
  HADAL_INPUT_CHECK(damaged.empty(), out, ": of its ", damaged.size(),
                    " checkpoints none is whole; the newest: ", damaged[0].second,
                    "; to begin anew, remove ", out, "/checkpoints");
  return "";
}

StageParts load_parts(const std::string& folder) {
  return parts_of(JsonObject::load(folder + concat("/", kProgressFile)));
}

model::Transformer open_masters(const std::string& folder, const model::ModelConfig& config) {
  const auto reader = checkpoint::TensorReader::open(folder + concat("/", kStateFile));
  model::Transformer model(config);
  model.visit([&](model::Parameter& parameter) { parameter.hold(reader.tensor(parameter.name)); });
  return model;
}

RunProgress load_state(const std::string& folder, model::Transformer& model, Optimizer& optimizer) {
  const JsonObject json = JsonObject::load(folder + concat("/", kProgressFile));
  const std::string format = json.string("format");
  HADAL_INPUT_CHECK(format == kStateFormat || format == kOldStateFormat, json.where("format"),
                    ": expected \"", kStateFormat, "\", found \"", format, "\"");
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
  const auto reader = checkpoint::TensorReader::open(folder + concat("/", kStateFile));
  const auto targets = named_state(model, optimizer);
  for (const auto& [target, unit, everywhere] : targets) {
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
