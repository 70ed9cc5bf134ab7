// hadal verify: a checkpoint's outputs against recorded ones.
#include "checkpoint/verify.h"

#include <cstdio>
#include <memory>

#include <ATen/Context.h>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "base/check.h"

namespace hadal::apps {

std::function<int()> define_verify(CLI::App& app) {
  struct Flags {
    checkpoint::VerifyOptions options;
    std::string numerics;
    std::string device = "cpu";
    double max_abs = -1.0;
  };
  auto flags = std::make_shared<Flags>();
  app.add_option("DIR", flags->options.folder,
                 "config.json, model.safetensors, expected.safetensors")
      ->required();
  app.add_option("--expected", flags->options.expected, "another file of expected tensors");
  app.add_option("--numerics", flags->numerics,
                 "ideal, bf16, released or fp8; default: by the checkpoint's storage");
  app.add_flag("--gradients", flags->options.gradients, "also compare grad.safetensors");
  app.add_option("--max-abs", flags->max_abs, "largest error of *.logits and layers.*.out");
  app.add_option("--device", flags->device, "cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  return [flags] {
    const bool cuda = flags->device == "cuda";
    HADAL_INPUT_CHECK(!cuda || at::globalContext().hasCUDA(),
                      "--device cuda: this build or machine has no CUDA device");
    flags->options.device = cuda ? at::kCUDA : at::kCPU;
    if (!flags->numerics.empty()) flags->options.numerics = ops::parse_numerics(flags->numerics);
    if (flags->max_abs >= 0.0) flags->options.max_abs = flags->max_abs;
    int64_t failed = 0, passed = 0, skipped = 0;
    checkpoint::verify(flags->options, [&](const checkpoint::VerifyLine& line) {
      if (passed + failed + skipped == 0) {
        std::printf("%-44s %10s %10s %10s %10s\n", "key", "count", "max", "mean", "agreement");
      }
      char agreement[32] = "-";
      if (line.agreement) std::snprintf(agreement, sizeof(agreement), "%.4f", *line.agreement);
      const char* verdict = line.skipped ? "SKIP" : line.pass ? "PASS" : "FAIL";
      std::printf("%-44s %10lld %10.3e %10.3e %10s %s  %s\n", line.key.c_str(),
                  static_cast<long long>(line.count), line.max, line.mean, agreement, verdict,
                  line.note.c_str());
      std::fflush(stdout);
      ++(line.skipped ? skipped : line.pass ? passed : failed);
    });
    std::printf("%lld passed, %lld failed, %lld skipped\n", static_cast<long long>(passed),
                static_cast<long long>(failed), static_cast<long long>(skipped));
    return failed == 0 ? 0 : 1;
  };
}

}  // namespace hadal::apps
