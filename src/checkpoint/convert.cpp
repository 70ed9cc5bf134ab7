#include "checkpoint/convert.h"

#include <filesystem>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "base/file.h"
#include "checkpoint/convert_files.h"
#include "checkpoint/hf_names.h"
#include "checkpoint/requantise.h"
#include "checkpoint/weight_checks.h"

namespace hadal::checkpoint {
namespace {

namespace fs = std::filesystem;

bool is_quantised_role(TensorRole role) {
  return role == TensorRole::kMatrix || role == TensorRole::kExpert;
}

bool is_codes(const at::Tensor& data) {
  const at::ScalarType type = data.scalar_type();
  return type == at::kFloat8_e4m3fn || type == at::kByte || type == at::kChar;
}

/// Counts what a conversion changes.
class Notes {
 public:
  explicit Notes(ConvertReport& report) : report_(report) {}
  void rounded(const std::string& name) {
    if (report_.rounded++ == 0) report_.first_rounded = name;
  }
  ConvertReport& report() { return report_; }

 private:
  ConvertReport& report_;
};

/// The value in another floating type, noted when that changes it.
at::Tensor to_type(const at::Tensor& value,
                   at::ScalarType type,
                   const std::string& name,
                   Notes& notes) {
  if (value.scalar_type() == type) return value;
  const at::Tensor result = value.to(type);
  if (!at::equal(result.to(at::kFloat), value.to(at::kFloat))) notes.rounded(name);
  return result;
}

/// A matrix in BF16 and any other tensor in the type it has for ever, or all in F32.
at::Tensor plain_value(const TensorSpec& spec,
                       const CheckpointTensor& stored,
                       Notes& notes,
                       bool in_f32 = false) {
  const at::ScalarType own = scalar_type(stored_weight(spec, Storage::kBf16).dtype);
  const at::ScalarType type = in_f32 && own == at::kBFloat16 ? at::kFloat : own;
  const at::Tensor dense =
      is_quantised_role(spec.role) ? dense_values(stored.data, stored.scale) : stored.data;
  return to_type(dense, type, spec.name, notes);
}

class PlainOutput {
 public:
  PlainOutput(ShardWriter& writer, bool in_f32, bool keep_scales)
      : writer_(writer), f32_(in_f32), keep_(keep_scales) {}

  void add(const TensorSpec& spec, const CheckpointTensor& stored, Notes& notes) {
    writer_.add({.name = spec.name, .tensor = plain_value(spec, stored, notes, f32_)});
    if (!keep_ || !stored.scale.defined()) return;
    writer_.add({.name = scale_name(spec.name),
                 .tensor = stored.scale,
                 .e8m0 = stored.scale.scalar_type() == at::kByte});
    ++notes.report().kept_scales;
  }

 private:
  ShardWriter& writer_;
  bool f32_, keep_;
};

class HfOutput {
 public:
  HfOutput(ShardWriter& writer, bool in_f32, int64_t num_experts)
      : writer_(writer), f32_(in_f32), experts_(num_experts) {}

  void add(const TensorSpec& spec, const CheckpointTensor& stored, Notes& notes) {
    const HfPlace place = hf_place(spec);
    const at::Tensor value = plain_value(spec, stored, notes, f32_);
    if (!place.is_stacked()) {
      notes.report().mtp_beside_hf |= place.name.starts_with("mtp.");
      writer_.add({.name = place.name, .tensor = value});
      return;
    }
    at::Tensor& stack = stacks_[place.name];
    if (!stack.defined()) {
      const int64_t halves = place.name.ends_with("gate_up_proj") ? 2 : 1;
      stack = at::empty({experts_, halves * value.size(0), value.size(1)}, value.options());
    }
    stack[place.expert].narrow(0, place.first_row, place.num_rows).copy_(value);
    // w3 of the last expert is the last matrix of a layer in the table.
    if (place.expert + 1 < experts_ || place.first_row == 0) return;
    for (auto& [name, tensor] : stacks_) writer_.add({.name = name, .tensor = tensor});
    stacks_.clear();
  }

 private:
  ShardWriter& writer_;
  bool f32_;
  int64_t experts_;
  std::map<std::string, at::Tensor> stacks_;
};

class OfficialOutput {
 public:
  OfficialOutput(ShardWriter& writer, Storage storage) : writer_(writer), storage_(storage) {}

  void add(const TensorSpec& spec, const CheckpointTensor& stored, Notes& notes) {
    if (!is_quantised_role(spec.role)) {
      writer_.add({.name = spec.name, .tensor = plain_value(spec, stored, notes)});
      return;
    }
    ops::StoredCodes codes{stored.data, stored.scale};
    if (!is_codes(stored.data)) codes = quantise(spec, stored, notes);
    if (codes.data.scalar_type() == at::kByte) codes.data = codes.data.view(at::kChar);
    writer_.add({.name = spec.name, .tensor = codes.data});
    writer_.add({.name = scale_name(spec.name),
                 .tensor = codes.scale,
                 .e8m0 = codes.scale.scalar_type() == at::kByte});
  }

 private:
  ops::StoredCodes quantise(const TensorSpec& spec, const CheckpointTensor& stored, Notes& notes) {
    if (stored.scale.defined()) {
      if (auto codes = requantise(stored.data, stored.scale)) {
        ++notes.report().kept_scales;
        return *codes;
      }
    }
    const bool fp4 = storage_ == Storage::kFp4 && spec.role == TensorRole::kExpert;
    const Storage storage = fp4 ? Storage::kFp4 : Storage::kFp8;
    HADAL_INPUT_CHECK(storage_ != Storage::kFp8F32Scales, spec.name,
                      ": does not lie on its kept F32 scales any more, and new ones are not made");
    if (auto codes = requantise(stored.data, storage, spec.name)) {
      ++notes.report().found_scales;
      return *codes;
    }
    notes.rounded(spec.name);
    return fp4 ? quantise_fp4(stored.data, spec.name) : quantise_fp8(stored.data, spec.name);
  }

  ShardWriter& writer_;
  Storage storage_;
};

/// How the output of a conversion to `official` stores its experts: as the input does, as kept
/// scales say, as the values allow, or as the release does.
Storage official_storage(const OfficialCheckpoint& input, const std::vector<TensorSpec>& table) {
  for (const TensorSpec& spec : table) {
    if (spec.role != TensorRole::kExpert) continue;
    const CheckpointTensor stored = input.get(spec.name);
    if (stored.scale.defined()) {
      if (stored.scale.scalar_type() == at::kFloat) return Storage::kFp8F32Scales;
      return stored.scale.size(1) * 32 == spec.shape[1] ? Storage::kFp4 : Storage::kFp8;
    }
    const bool only_fp8 = !requantise(stored.data, Storage::kFp4, spec.name).has_value() &&
                          requantise(stored.data, Storage::kFp8, spec.name).has_value();
    return only_fp8 ? Storage::kFp8 : Storage::kFp4;
  }
  throw Error("convert: a model without experts");
}

/// tokenizer.json, generation_config.json and whatever else lies beside the weights as JSON or as a
/// chat template.
void copy_other_files(const std::string& from, const std::string& to) {
  for (const fs::directory_entry& entry : fs::directory_iterator(from)) {
    const std::string name = entry.path().filename().string();
    const std::string extension = entry.path().extension().string();
    if (!entry.is_regular_file() || (extension != ".json" && extension != ".jinja")) continue;
    if (name == "config.json" || name == "model.safetensors.index.json") continue;
    write_file_atomic(to + "/" + name, read_file(entry.path().string()));
  }
  // Which levels of reasoning effort a model was taught is known by its encoder alone.
  const std::string encoder = "/encoding/encoding_dsv4.py";
  if (!fs::is_regular_file(from + encoder)) return;
  fs::create_directories(to + "/encoding");
  write_file_atomic(to + encoder, read_file(from + encoder));
}

}  // namespace

ConvertTarget parse_convert_target(const std::string& name) {
  if (name == "bf16") return ConvertTarget::kBf16;
  if (name == "f32") return ConvertTarget::kF32;
  if (name == "official") return ConvertTarget::kOfficial;
  if (name == "hf-bf16") return ConvertTarget::kHfBf16;
  HADAL_INPUT_CHECK(name == "hf-f32",
                    "--to: expected bf16, f32, official, hf-bf16 or hf-f32, found '", name, "'");
  return ConvertTarget::kHfF32;
}

ConvertReport convert(const ConvertOptions& options) {
  const at::NoGradGuard no_grad;
  std::error_code ignored;
  HADAL_INPUT_CHECK(fs::is_directory(options.in, ignored), options.in, ": is no folder");
  const OfficialCheckpoint input = OfficialCheckpoint::open(options.in);
  const model::ModelConfig& config = input.config();
  const std::vector<TensorSpec> table = tensor_table(config);
  const ConvertTarget target = options.target;
  const bool to_hf = target == ConvertTarget::kHfBf16 || target == ConvertTarget::kHfF32;
  const bool f32 = target == ConvertTarget::kF32 || target == ConvertTarget::kHfF32;
  // What cannot be written is refused before anything is.
  const bool to_official = target == ConvertTarget::kOfficial;
  const Storage storage = to_official ? official_storage(input, table) : Storage::kBf16;
  if (to_official && storage != Storage::kFp8F32Scales) config.check_released();
  const std::string config_json = converted_config(
      options.in + "/config.json", config, {.storage = storage, .transformers = to_hf, .f32 = f32});
  AtomicDirectory directory(options.out);
  check_weights(input);
  ConvertReport report;
  report.naming = input.naming();
  Notes notes(report);
  ShardWriter writer(directory.temporary(), options.max_shard_bytes);
  const auto walk = [&](auto&& output) {
    for (const TensorSpec& spec : table) {
      output.add(spec, input.get(spec.name), notes);
      ++report.tensors;
      if (options.progress)
        options.progress(report.tensors, static_cast<int64_t>(table.size()), spec.name);
    }
  };
  if (to_official)
    walk(OfficialOutput(writer, storage));
  else if (to_hf)
    walk(HfOutput(writer, f32, config.n_routed_experts));
  else
    walk(PlainOutput(writer, f32, !f32 && !options.drop_scales));
  writer.finish();
  write_file_atomic(directory.temporary() + "/config.json", config_json);
  copy_other_files(options.in, directory.temporary());
  if (to_hf) write_transformers_files(directory.temporary(), config);
  directory.commit();
  return report;
}

}  // namespace hadal::checkpoint
