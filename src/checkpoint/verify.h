// Comparison of a checkpoint's outputs with recorded ones: any directory laid out as config.json,
// model.safetensors, expected.safetensors and perhaps grad.safetensors (docs/numerics.md lists the
// keys).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model/contiguous_kv.h"
#include "ops/op.h"

namespace hadal::checkpoint {

struct VerifyOptions {
  std::string folder;
  std::string expected;  ///< empty: expected.safetensors in the folder
  std::optional<ops::Numerics> numerics;
  bool gradients = false;
  /// Of *.logits and layers.*.out; default: 2e-5 in `ideal`, five times that on a GPU, none in
  /// `released`.
  std::optional<double> max_abs;
  at::Device device = at::kCPU;
};

/// One key: what was compared and whether it holds.
struct VerifyLine {
  std::string key;
  int64_t count = 0;
  double max = 0.0, mean = 0.0;
  std::optional<double> agreement;  ///< share of equal entries, rows or choices
  std::string note;
  bool pass = true;
  bool skipped = false;
};

/// The cache under test, for `slots` sequences of at most `max_tokens`.
using CacheFactory =
    std::function<std::unique_ptr<model::ContiguousKv>(const model::ModelConfig& config,
                                                       int64_t slots,
                                                       int64_t max_tokens,
                                                       at::ScalarType dtype,
                                                       at::Device device)>;
std::unique_ptr<model::ContiguousKv> make_reference_cache(const model::ModelConfig& config,
                                                          int64_t slots,
                                                          int64_t max_tokens,
                                                          at::ScalarType dtype,
                                                          at::Device device);

/// Runs prefill, decode and MTP (and gradients) and reports each key as it is done. Rows that must
/// be the recorded bits are asked of the CPU alone. InputError for unusable files, and
/// for gradients and drafters elsewhere than on the CPU.
void verify(const VerifyOptions& options,
            const std::function<void(const VerifyLine&)>& report,
            const CacheFactory& make_cache = make_reference_cache);

}  // namespace hadal::checkpoint
