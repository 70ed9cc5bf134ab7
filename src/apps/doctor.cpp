// hadal doctor: what this machine has, what hadal makes of it, and which models fit.
#include <cstdio>
#include <memory>
#include <optional>
#include <vector>

#include <ATen/Context.h>
#include <torch/headeronly/version.h>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "apps/machine.h"
#include "apps/model_folder.h"
#include "base/check.h"
#include "base/cpu.h"
#include "base/join.h"
#include "base/json.h"
#include "base/parallel.h"
#include "checkpoint/names.h"
#include "checkpoint/official.h"
#include "model/presets.h"

namespace hadal::apps {
namespace {

using checkpoint::Storage;

/// A checkpoint by its weights: caches and activations come on top.
struct Candidate {
  std::string name;
  int64_t parameters = 0;
  int64_t bytes = 0;  ///< as released
};

Candidate candidate(const std::string& name, const model::ModelConfig& config, Storage storage) {
  const checkpoint::Census census = checkpoint::take_census(config, storage);
  return {name, census.total().parameters, census.total().bytes};
}

/// The shipped model, if it is there and sound; `problem` says why not.
std::optional<Candidate> shipped_model(const ModelSearch& search, std::string& problem) {
  if (search.found.empty()) {
    problem = "not found";
    return std::nullopt;
  }
  try {
    const auto files = checkpoint::OfficialCheckpoint::open(search.found);
    return candidate("default model", files.config(), files.storage());
  } catch (const InputError& error) {
    problem = error.what();
    return std::nullopt;
  }
}

std::vector<Candidate> released_models() {
  const model::ModelConfig flash = model::deepseek_v4_flash(), pro = model::deepseek_v4_pro();
  return {candidate("V4-Flash", flash, Storage::kFp4),
          candidate("V4-Flash-Base", flash, Storage::kFp8F32Scales),
          candidate("V4-Pro", pro, Storage::kFp4),
          candidate("V4-Pro-Base", pro, Storage::kFp8F32Scales)};
}

struct Report {
  Machine machine;
  ModelSearch search;
  std::string problem;  ///< with the default model
  std::vector<Candidate> candidates;
  int64_t gpu_free = 0, gpu_total = 0;  ///< of all GPUs together

  bool in_memory(const Candidate& c) const { return c.bytes <= machine.memory_available; }
  bool on_gpu(const Candidate& c) const { return c.bytes <= gpu_free; }
};

std::string gigabytes(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.*f GB", bytes < 10'000'000'000 ? 3 : 1,
                static_cast<double>(bytes) / 1e9);
  return text;
}

void print_text(const Report& report) {
  const Machine& m = report.machine;
  std::printf("CPU         %s\n", m.cpu.empty() ? "unknown" : m.cpu.c_str());
  std::printf("  features  %s\n", m.cpu_features.empty() ? "none of those hadal knows"
                                                         : join(m.cpu_features, " ").c_str());
  std::printf("  kernels   %s\n", std::string(isa_name(current_isa())).c_str());
  std::printf("  cores     %d, %d threads in use\n", m.processors, num_threads());
  std::printf("memory      %s, %s available\n", gigabytes(m.memory_total).c_str(),
              gigabytes(m.memory_available).c_str());
  for (const Gpu& gpu : m.gpus)
    std::printf("GPU         %s, %s, %s free\n", gpu.name.c_str(),
                gigabytes(gpu.total_bytes).c_str(), gigabytes(gpu.free_bytes).c_str());
  if (m.gpus.empty()) std::printf("GPU         none found\n");
  std::printf("  driver    %s\n", m.gpu_driver.empty() ? "none found" : m.gpu_driver.c_str());
  std::printf("LibTorch    %s, this build %s CUDA\n", TORCH_VERSION,
              at::globalContext().hasCUDA() ? "runs" : "does not run");
  if (report.search.found.empty()) {
    std::printf("model       none; looked in %s\n", join(report.search.looked).c_str());
  } else {
    std::printf("model       %s%s\n", report.search.found.c_str(),
                report.problem.empty() ? "" : (": " + report.problem).c_str());
  }
  std::printf("\n  %-16s %12s %14s %10s %10s\n", "weights of", "parameters", "bytes", "memory",
              "GPU");
  for (const Candidate& c : report.candidates) {
    std::printf("  %-16s %10.4g B %14s %10s %10s\n", c.name.c_str(),
                static_cast<double>(c.parameters) / 1e9, gigabytes(c.bytes).c_str(),
                report.in_memory(c) ? "fits" : "too large",
                report.gpu_total == 0 ? "-"
                : report.on_gpu(c)    ? "fits"
                                      : "too large");
  }
  std::printf(
      "\nWeights as released, against what is free now%s; caches and activations come on "
      "top.\n",
      m.gpus.size() > 1 ? " on all GPUs together" : "");
}

void print_json(const Report& report) {
  const Machine& m = report.machine;
  JsonWriter out;
  out.begin_object().key("cpu").begin_object().field("name", std::string_view(m.cpu));
  out.key("features").begin_array();
  for (const std::string& feature : m.cpu_features) out.value(std::string_view(feature));
  out.end_array().field("kernels", isa_name(current_isa()));
  out.field("processors", m.processors).field("threads", num_threads()).end_object();
  out.key("memory").begin_object().field("total_bytes", m.memory_total);
  out.field("available_bytes", m.memory_available).end_object();
  out.key("gpus").begin_array();
  for (const Gpu& gpu : m.gpus)
    out.begin_object()
        .field("name", std::string_view(gpu.name))
        .field("total_bytes", gpu.total_bytes)
        .field("free_bytes", gpu.free_bytes)
        .end_object();
  out.end_array().field("gpu_driver", std::string_view(m.gpu_driver));
  out.field("libtorch", TORCH_VERSION).field("cuda", at::globalContext().hasCUDA());
  out.key("default_model").begin_object();
  out.field("found", std::string_view(report.search.found));
  out.field("problem", std::string_view(report.problem)).key("looked").begin_array();
  for (const std::string& folder : report.search.looked) out.value(std::string_view(folder));
  out.end_array().end_object().key("models").begin_array();
  for (const Candidate& c : report.candidates)
    out.begin_object()
        .field("name", std::string_view(c.name))
        .field("parameters", c.parameters)
        .field("bytes", c.bytes)
        .field("fits_memory", report.in_memory(c))
        .field("fits_gpu", report.on_gpu(c))
        .end_object();
  std::fputs(out.end_array().end_object().str().c_str(), stdout);
}

int run(bool json) {
  Report report;
  report.machine = look_at_machine();
  report.search = search_default_model();
  for (const Gpu& gpu : report.machine.gpus) {
    report.gpu_free += gpu.free_bytes;
    report.gpu_total += gpu.total_bytes;
  }
  if (const auto shipped = shipped_model(report.search, report.problem))
    report.candidates.push_back(*shipped);
  for (const Candidate& released : released_models()) report.candidates.push_back(released);
  json ? print_json(report) : print_text(report);
  return 0;
}

}  // namespace

std::function<int()> define_doctor(CLI::App& app) {
  auto json = std::make_shared<bool>(false);
  app.add_flag("--json", *json, "print JSON");
  return [json] { return run(*json); };
}

}  // namespace hadal::apps
