#include "checkpoint/load_model.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <span>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/log.h"
#include "base/progress.h"
#include "checkpoint/requantise.h"
#include "checkpoint/weight_checks.h"
#include "ops/gemm/sm90_products.h"
#include "ops/gemm/sm90_upload.h"

namespace hadal::checkpoint {
namespace {

using model::Parameter;
using model::ParamKind;

bool is_fp8(const CheckpointTensor& tensor) {
  return tensor.data.scalar_type() == at::kFloat8_e4m3fn;
}
bool is_fp4(const CheckpointTensor& tensor) {
  return tensor.data.scalar_type() == at::kByte || tensor.data.scalar_type() == at::kChar;
}
bool is_coded(const CheckpointTensor& tensor) { return is_fp8(tensor) || is_fp4(tensor); }
/// FP8 with FP32 scales, not all of them powers of two (power_scales()).
bool has_factors(const CheckpointTensor& tensor) {
  return tensor.scale.defined() && tensor.scale.scalar_type() == at::kFloat && is_coded(tensor);
}

/// FP32 scales as E8M0 bytes; nullopt unless all are powers of two from 2^-126 to 2^127.
std::optional<at::Tensor> power_scales(const at::Tensor& scale) {
  const at::Tensor bits = scale.contiguous().view(at::kInt);
  const at::Tensor exponent =
      bits.bitwise_right_shift(23);  // with the sign: 256 and more, or below 0
  const at::Tensor fits =
      bits.bitwise_and(0x7fffff).eq(0).logical_and(exponent.ge(1)).logical_and(exponent.le(254));
  if (!fits.all().item<bool>()) return std::nullopt;
  return exponent.to(at::kByte);
}

bool serves_packed(const Parameter& parameter) {
  return parameter.is_matrix() || parameter.kind == ParamKind::kHead;
}

/// Whether a numerics other than `ideal` holds these values in BF16: a matrix that is stored so, or
/// in codes. One stored in F32 stays it, because no numerics rounds what is stored. Rows of the
/// embedding are activations.
bool in_bf16(const Parameter& parameter, const CheckpointTensor& stored) {
  if (parameter.kind == ParamKind::kEmbedding) return true;
  return serves_packed(parameter) && stored.data.scalar_type() != at::kFloat &&
         stored.data.scalar_type() != at::kHalf && !has_factors(stored);
}

/// Codes as the packing functions of ops take them.
struct Codes {
  std::vector<at::Tensor> data, scale;
};

/// Reads parameters of one checkpoint for one numerics and target.
class Loader {
 public:
  Loader(const OfficialCheckpoint& checkpoint, ops::Numerics numerics, LoadTarget target)
      : checkpoint_(checkpoint), numerics_(numerics), target_(target) {
    HADAL_CHECK(target.held != Held::kPanels || target.device.is_cpu(),
                "load_model: panels are for the CPU");
    if (target.held != Held::kAccelerator || numerics == ops::Numerics::kIdeal) return;
    uploader_.emplace(target.device, [this](const std::byte* from, std::span<std::byte> to) {
      constexpr size_t kInCache = size_t{256} << 10;  // looked at before it leaves the caches
      for (size_t at = 0; at < to.size(); at += kInCache) {
        const auto part = to.subspan(at, std::min(kInCache, to.size() - at));
        checkpoint_.reader().read(from + at, part);
        scans_.look(from + at, part);
      }
    });
  }

  void load(Parameter& parameter) {
    if (!uploader_ || !upload(parameter)) load_by_host(parameter);
  }

  /// After the last parameter.
  void finish() {
    for (const Doubtful& one : doubtful_) {
      if (one.inexact.item<int32_t>() != 0) load_by_host(*one.parameter);
    }
    doubtful_.clear();
    if (uploader_) check_weights(checkpoint_, &scans_);
  }

  bool uploads() const { return uploader_.has_value(); }
  int64_t num_without_form() const { return without_form_; }

 private:
  /// Held, unless the layout turns out to have no exact form for it.
  struct Doubtful {
    Parameter* parameter;
    at::Tensor inexact;
  };

  void load_by_host(Parameter& parameter) {
    const std::vector<CheckpointTensor> tensors = stored(parameter);
    parameter.as_stored = false;
    const bool ideal = numerics_ == ops::Numerics::kIdeal;
    const bool packs = target_.held != Held::kDense && serves_packed(parameter);
    if (packs && reads_codes() && is_coded(tensors[0])) {
      if (ops::Weight weight = coded_weight(tensors, parameter); weight.defined()) {
        parameter.hold(std::move(weight));
        return;
      }
    }
    at::Tensor value = dense_shard(tensors, parameter);
    if (value.is_floating_point()) {
      const bool low =
          !ideal && in_bf16(parameter, tensors[0]) &&
          (parameter.kind != ParamKind::kExperts || value.scalar_type() == at::kBFloat16);
      value = value.to(low ? at::kBFloat16 : at::kFloat).contiguous();
      parameter.as_stored = !ideal;
    }
    if (packs && !ideal && target_.held == Held::kAccelerator) {
      const auto packed = ops::Weight(matrices_of(value, parameter))
                              .to_sm90(ops::OfficialStorage::kBf16, parameter.role);
      if (packed) return parameter.hold(packed->to(target_.device));
    }
    parameter.hold(value.to(target_.device));
    if (!packs || target_.held != Held::kPanels) return;
    parameter.hold(ops::Weight(ops::pack_panels(matrices_of(value, parameter))));
  }

  /// Packed on the device, out of bytes that are read once. False for what is left to the host.
  bool upload(Parameter& parameter) {
    const std::vector<CheckpointTensor> tensors = stored(parameter);
    std::optional<Codes> codes;
    ops::WeightFormat format = ops::WeightFormat::kBf16;
    // E8M0 scales that were made of F32 ones lie in no file.
    if (is_coded(tensors[0]) && checkpoint_.storage() == Storage::kFp8F32Scales) return false;
    if (serves_packed(parameter) && reads_codes() && is_coded(tensors[0])) {
      codes = codes_of(tensors, parameter);
      format = is_fp8(tensors[0]) ? ops::WeightFormat::kFp8 : ops::WeightFormat::kFp4;
    } else if (parameter.shard.whole() && all_bf16(tensors)) {
      if (parameter.kind == ParamKind::kEmbedding && !target_.device.is_cpu()) {
        expect(parameter, tensors);
        parameter.as_stored = true;
        parameter.hold(ops::upload(*uploader_, tensors[0].data));
        return true;
      }
      if (serves_packed(parameter)) codes = bf16_of(tensors, parameter);
    }
    if (!codes) return false;
    const bool widened =
        format == ops::WeightFormat::kFp8 && parameter.role == ops::GemmRole::kBf16;
    ops::Sm90Matrices matrices = ops::plan_upload(format, widened, codes->data, codes->scale);
    const bool bf16 = format == ops::WeightFormat::kBf16;
    if (!matrices.data.defined() || !(bf16 || serves(matrices, parameter))) return false;
    expect(parameter, tensors);
    const at::Tensor inexact = ops::upload_sm90(*uploader_, matrices, codes->data, codes->scale);
    if (!bf16) doubtful_.push_back({&parameter, inexact});
    parameter.as_stored = bf16;
    parameter.hold(ops::Weight(std::move(matrices)));
    return true;
  }

  static bool all_bf16(const std::vector<CheckpointTensor>& tensors) {
    return std::ranges::all_of(tensors, [](const CheckpointTensor& tensor) {
      return tensor.data.scalar_type() == at::kBFloat16 && tensor.data.dim() == 2;
    });
  }

  /// The matrices of a parameter that is stored in BF16.
  static Codes bf16_of(const std::vector<CheckpointTensor>& tensors, const Parameter& parameter) {
    Codes matrices;
    const int64_t groups = parameter.kind == ParamKind::kGroups ? parameter.local_units() : 1;
    for (const CheckpointTensor& tensor : tensors) {
      for (const at::Tensor& matrix : tensor.data.chunk(groups, 0)) matrices.data.push_back(matrix);
    }
    return matrices;
  }

  /// What is read as a whole is looked at as it comes by; of what is read in part check_weights
  /// looks at all.
  void expect(const Parameter& parameter, const std::vector<CheckpointTensor>& tensors) {
    if (!parameter.shard.whole() && !by_expert(parameter)) return;
    const std::vector<std::string> names = stored_names(parameter);
    for (size_t i = 0; i < names.size(); ++i) scans_.expect(names[i], tensors[i]);
  }

  /// On an accelerator the products of codes round their rows, as `released` alone does.
  bool reads_codes() const {
    return numerics_ == ops::Numerics::kReleased ||
           (numerics_ != ops::Numerics::kIdeal && target_.held == Held::kPanels);
  }

  /// [matrices, out, in] of wo_a, else the value itself.
  static at::Tensor matrices_of(const at::Tensor& value, const Parameter& parameter) {
    return parameter.kind == ParamKind::kGroups
               ? value.reshape({parameter.local_units(), -1, value.size(-1)})
               : value;
  }

  /// The stored matrices of a parameter: one for each expert of its shard, else one.
  static std::vector<std::string> stored_names(const Parameter& parameter) {
    const size_t star = parameter.name.find('*');
    if (star == std::string::npos) return {parameter.name};
    std::vector<std::string> names;
    const int64_t first = by_expert(parameter) ? parameter.shard.offset : 0;
    const int64_t count = by_expert(parameter) ? parameter.shard.length : parameter.shape[0];
    for (int64_t expert = first; expert < first + count; ++expert) {
      names.push_back(parameter.name);
      names.back().replace(star, 1, std::to_string(expert));
    }
    return names;
  }
  std::vector<CheckpointTensor> stored(const Parameter& parameter) const {
    std::vector<CheckpointTensor> tensors;
    for (const std::string& name : stored_names(parameter))
      tensors.push_back(checkpoint_.get(name));
    use_power_scales(tensors, parameter);
    return tensors;
  }

  /// FP32 scales become E8M0 where all of a parameter's allow it, which changes no value.
  void use_power_scales(std::vector<CheckpointTensor>& tensors, const Parameter& parameter) const {
    std::vector<at::Tensor> scales;
    for (const CheckpointTensor& tensor : tensors) {
      if (!has_factors(tensor)) return;
      const std::optional<at::Tensor> powers = power_scales(tensor.scale);
      HADAL_INPUT_CHECK(powers || target_.held != Held::kAccelerator, checkpoint_.reader().path(),
                        ": the F32 scales of ", parameter.name,
                        " are no powers of two, which the CPU alone multiplies by");
      if (!powers) return;
      scales.push_back(*powers);
    }
    for (size_t i = 0; i < tensors.size(); ++i) tensors[i].scale = scales[i];
  }

  static bool by_expert(const Parameter& parameter) {
    return parameter.kind == ParamKind::kExperts && !parameter.shard.whole() &&
           parameter.shard.axis == 0;
  }

  /// FP8 and FP4 as they are stored; undefined for what the target has no form for.
  ops::Weight coded_weight(const std::vector<CheckpointTensor>& tensors,
                           const Parameter& parameter) {
    const std::optional<Codes> codes = codes_of(tensors, parameter);
    const bool fp8 = is_fp8(tensors[0]);
    if (codes && target_.held == Held::kPanels) {
      auto panels =
          fp8 ? ops::pack_fp8(codes->data, codes->scale) : ops::pack_fp4(codes->data, codes->scale);
      if (panels) return ops::Weight(std::move(*panels));
    }
    if (codes && target_.held == Held::kAccelerator) {
      const bool widened = parameter.role == ops::GemmRole::kBf16;
      auto matrices = !fp8      ? ops::pack_sm90_fp4(codes->data, codes->scale)
                      : widened ? ops::pack_sm90_widened(codes->data, codes->scale)
                                : ops::pack_sm90_fp8(codes->data, codes->scale);
      // What no kernel multiplies would be made dense for every product.
      if (matrices && serves(*matrices, parameter))
        return ops::Weight(matrices->to(target_.device));
    }
    ++without_form_;
    return {};
  }

  static bool serves(const ops::Sm90Matrices& matrices, const Parameter& parameter) {
    switch (parameter.kind) {
      case ParamKind::kExperts:
        return ops::serves_grouped_sm90(matrices);
      case ParamKind::kGroups:
        return ops::serves_groups_sm90(matrices);
      default:
        return ops::serves_linear_sm90(matrices, parameter.role);
    }
  }

  /// nullopt where matrices are stored in several ways, or where the grid of FP8 scales cuts
  /// through one: the groups of wo_a share a grid, and rows of a shard are a part of it. Only
  /// products of experts take FP4.
  static std::optional<Codes> codes_of(const std::vector<CheckpointTensor>& tensors,
                                       const Parameter& parameter) {
    const model::Shard& shard = parameter.shard;
    const bool cut = !shard.whole() && !by_expert(parameter);
    if (cut && (shard.axis != 0 || parameter.kind == ParamKind::kExperts)) return std::nullopt;
    const int64_t groups = parameter.kind == ParamKind::kGroups ? parameter.local_units() : 1;
    Codes codes;
    for (const CheckpointTensor& tensor : tensors) {
      if (is_fp8(tensor) != is_fp8(tensors[0]) || !is_coded(tensor)) return std::nullopt;
      if (is_fp4(tensor) && parameter.kind != ParamKind::kExperts) return std::nullopt;
      const int64_t first = cut ? shard.offset : 0;
      const int64_t rows = cut ? shard.length : tensor.data.size(0);
      const int64_t out = rows / groups;
      const int64_t grid = is_fp8(tensor) ? 128 : 1;
      for (int64_t row = first; row < first + rows; row += out) {
        const bool at_end = row + out == tensor.data.size(0);
        if (row % grid != 0 || (out % grid != 0 && !at_end)) return std::nullopt;
        codes.data.push_back(tensor.data.narrow(0, row, out));
        codes.scale.push_back(tensor.scale.narrow(0, row / grid, (out + grid - 1) / grid));
      }
    }
    return codes;
  }

  /// FP8 and FP4 values have an exact BF16 form, which is half of their FP32 one; what is stored in
  /// a float type stays in it.
  static at::Tensor dense_shard(const std::vector<CheckpointTensor>& tensors,
                                const Parameter& parameter) {
    if (parameter.kind != ParamKind::kExperts)
      return parameter.shard.of(dense_values(tensors[0].data, tensors[0].scale));
    std::vector<at::Tensor> experts;
    bool all_bf16 = true;
    for (const CheckpointTensor& tensor : tensors) {
      const at::Tensor value = dense_values(tensor.data, tensor.scale);
      experts.push_back(is_coded(tensor) && !has_factors(tensor) ? value.to(at::kBFloat16) : value);
      all_bf16 = all_bf16 && experts.back().scalar_type() == at::kBFloat16;
    }
    if (!all_bf16)
      for (at::Tensor& expert : experts) expert = expert.to(at::kFloat);
    const at::Tensor all = at::stack(experts);
    return by_expert(parameter) ? all : parameter.shard.of(all);
  }

  const OfficialCheckpoint& checkpoint_;
  ops::Numerics numerics_;
  LoadTarget target_;
  int64_t without_form_ = 0;
  WeightScans scans_;
  std::optional<ops::Uploader> uploader_;  ///< to an accelerator; reads through scans_
  std::vector<Doubtful> doubtful_;
};

/// Shows how far a large load is, and says what it took.
class LoadProgress {
 public:
  explicit LoadProgress(const TensorReader& reader) {
    constexpr int64_t kLarge = int64_t{4} << 30;
    for (const std::string& name : reader.names()) total_ += reader.info(name).num_bytes();
    if (total_ >= kLarge) progress_.emplace("load", total_, "B");
  }
  void add(const Parameter& parameter) {
    done_ += parameter.num_bytes();  // about what it has in the files
    if (progress_) progress_->update(std::min(done_, total_));
  }
  void finish() {
    if (!progress_) return;
    progress_->finish();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin_;
    const double gigabytes = static_cast<double>(total_) / 1e9;
    const auto tenths = [](double value) { return std::round(value * 10) / 10; };
    log::info("checkpoint", tenths(gigabytes), " GB of weights in ", tenths(taken.count()), " s, ",
              tenths(gigabytes / taken.count()), " GB/s");
  }

 private:
  std::optional<Progress> progress_;
  int64_t total_ = 0, done_ = 0;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

void check_fp8(const OfficialCheckpoint& checkpoint, const LoadTarget& target) {
  checkpoint.config().check_fp8();
  HADAL_INPUT_CHECK(checkpoint.storage() != Storage::kFp4, checkpoint.reader().path(),
                    ": numerics fp8 has no FP4, but the experts are stored in it; expected "
                    "numerics released or bf16");
  HADAL_INPUT_CHECK(target.held != Held::kAccelerator, checkpoint.reader().path(),
                    ": numerics fp8 is for the CPU; expected numerics released or bf16 on an "
                    "accelerator");
}

}  // namespace

ops::Numerics default_numerics(const OfficialCheckpoint& checkpoint) {
  switch (checkpoint.storage()) {
    case Storage::kFp4:
      return ops::Numerics::kReleased;
    case Storage::kFp8:
    case Storage::kFp8F32Scales:
      return ops::Numerics::kFp8;
    case Storage::kBf16:
      break;
  }
  return ops::Numerics::kIdeal;
}

LoadTarget serving_target(at::Device device) {
  return {.held = device.is_cpu() ? Held::kPanels : Held::kAccelerator, .device = device};
}

model::Transformer load_model(const OfficialCheckpoint& checkpoint,
                              ops::Numerics numerics,
                              LoadTarget target) {
  model::Transformer model(checkpoint.config());
  load_weights(model, checkpoint, numerics, target);
  return model;
}

void load_weights(model::Transformer& model,
                  const OfficialCheckpoint& checkpoint,
                  ops::Numerics numerics,
                  LoadTarget target) {
  HADAL_CHECK(model.config() == checkpoint.config(),
              "load_weights: a model of another config than ", checkpoint.reader().path());
  if (numerics == ops::Numerics::kReleased) checkpoint.config().check_released();
  if (numerics == ops::Numerics::kFp8) check_fp8(checkpoint, target);
  Loader loader(checkpoint, numerics, target);
  // What an upload reads is looked at on the way.
  if (!loader.uploads()) check_weights(checkpoint);
  LoadProgress progress(checkpoint.reader());
  model.visit([&](Parameter& parameter) {
    if (parameter.elsewhere) return;
    loader.load(parameter);
    progress.add(parameter);
  });
  loader.finish();
  progress.finish();
  if (target.held == Held::kAccelerator && loader.num_without_form() > 0) {
    log::warn(
        "checkpoint", loader.num_without_form(),
        " parameters in FP8 or FP4 have no form in the accelerator's layout and are held in BF16");
  }
}

}  // namespace hadal::checkpoint
