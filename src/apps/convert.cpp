// hadal convert: a checkpoint to another storage or to transformers' names.
#include "checkpoint/convert.h"

#include <cstdio>
#include <memory>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "apps/flags.h"
#include "base/progress.h"

namespace hadal::apps {
namespace {

struct ConvertFlags {
  std::string target;
  checkpoint::ConvertOptions options;
};

int run(ConvertFlags flags) {
  flags.options.target = checkpoint::parse_convert_target(flags.target);
  std::unique_ptr<Progress> bar;
  flags.options.progress = [&](int64_t done, int64_t total, const std::string& name) {
    if (!bar) bar = std::make_unique<Progress>("convert", total, "tensors");
    bar->update(done, name);
  };
  const checkpoint::ConvertReport report = checkpoint::convert(flags.options);
  bar.reset();
  const bool official_names = report.naming == checkpoint::Naming::kOfficial;
  std::printf("%lld tensors%s%s%s to %s\n", static_cast<long long>(report.tensors),
              official_names ? "" : " (", official_names ? "" : naming_name(report.naming),
              official_names ? "" : ")", flags.options.out.c_str());
  const bool official = flags.options.target == checkpoint::ConvertTarget::kOfficial;
  if (report.kept_scales > 0) {
    std::printf(official
                    ? "%lld matrices have their original bytes, by the scales kept beside them\n"
                    : "%lld original scales are kept beside the BF16 weights\n",
                static_cast<long long>(report.kept_scales));
  }
  if (report.found_scales > 0) {
    std::printf("%lld matrices have new scales; no value changed\n",
                static_cast<long long>(report.found_scales));
  }
  if (report.mtp_beside_hf) {
    std::printf(
        "transformers drops the MTP block or drafter: it is here under its official names, "
        "mtp.*\n");
  }
  if (report.rounded > 0) {
    std::printf("lossy: values of %lld tensors were rounded, %s the first\n",
                static_cast<long long>(report.rounded), report.first_rounded.c_str());
  } else {
    std::printf("lossless: every value is what it was\n");
  }
  return 0;
}

}  // namespace

std::function<int()> define_convert(CLI::App& app) {
  auto flags = std::make_shared<ConvertFlags>();
  app.add_option("--in", flags->options.in, "checkpoint folder, official or transformers' names")
      ->required();
  app.add_option("--out", flags->options.out, "folder to write; it must not exist yet")->required();
  app.add_option("--to", flags->target, "bf16, f32, official, hf-bf16 or hf-f32")->required();
  app.add_flag("--drop-scales", flags->options.drop_scales,
               "bf16: do not keep the original scales beside the weights");
  app.add_option("--max-shard-bytes", flags->options.max_shard_bytes, "bytes of a file at most")
      ->check(above(0))
      ->capture_default_str();
  return [flags] { return run(*flags); };
}

}  // namespace hadal::apps
