#include "checkpoint/convert.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/file.h"
#include "base/join.h"
#include "base/log.h"
#include "checkpoint/hf_names.h"
#include "checkpoint/official.h"
#include "checkpoint/requantise.h"

namespace hadal::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr size_t kListed = 20;  // tensors named in one message

bool is_quantised_role(TensorRole role) {
  return role == TensorRole::kMatrix || role == TensorRole::kExpert;
}

bool is_codes(const at::Tensor& data) {
  const at::ScalarType type = data.scalar_type();
  return type == at::kFloat8_e4m3fn || type == at::kByte || type == at::kChar;
}

/// The tensors of a folder under official names, whatever it calls them.
class Input {
 public:
  virtual ~Input() = default;
  virtual const model::ModelConfig& config() const = 0;
  /// Shapes are checked by then.
  virtual CheckpointTensor get(const TensorSpec& spec) const = 0;
  virtual bool is_hf() const = 0;
};

class OfficialInput : public Input {
 public:
  explicit OfficialInput(const std::string& folder)
      : checkpoint_(OfficialCheckpoint::open(folder)) {}
  const model::ModelConfig& config() const override { return checkpoint_.config(); }
  CheckpointTensor get(const TensorSpec& spec) const override { return checkpoint_.get(spec.name); }
  bool is_hf() const override { return false; }

 private:
  OfficialCheckpoint checkpoint_;
};

class HfInput : public Input {
 public:
  HfInput(const std::string& folder, TensorReader reader)
      : reader_(std::move(reader)), config_(model::load_config(folder)) {
    const auto names = reader_.names();
    const bool has_mtp = std::any_of(names.begin(), names.end(),
                                     [](const auto& name) { return name.starts_with("mtp."); });
    if (config_.n_mtp_layers == 1 && !has_mtp) {
      log::warn("convert", folder, ": the config names an MTP block, the files hold none");
      config_.n_mtp_layers = 0;
      config_.compress_ratios.pop_back();
    }
    check();
  }
  const model::ModelConfig& config() const override { return config_; }
  bool is_hf() const override { return true; }

  CheckpointTensor get(const TensorSpec& spec) const override {
    const HfPlace place = find(spec);
    CheckpointTensor result{reader_.tensor(place.name), {}};
    const std::string scale = scale_of(place.name);
    if (!scale.empty()) result.scale = reader_.tensor(scale);
    if (!place.is_stacked()) return result;
    result.data = result.data[place.expert].narrow(0, place.first_row, place.num_rows);
    if (result.scale.defined()) {
      // Scale rows are 128 weight rows each (FP8), or one (FP4).
      const at::Tensor all = result.scale[place.expert];
      const int64_t rows_each =
          all.size(0) * 128 <= reader_.info(place.name).shape[1] + 127 ? 128 : 1;
      result.scale =
          all.narrow(0, place.first_row / rows_each, (place.num_rows + rows_each - 1) / rows_each);
    }
    return result;
  }

 private:
  std::string scale_of(const std::string& name) const {
    for (const std::string& candidate :
         {hf_scale_name(name), name.ends_with(".weight") ? scale_name(name) : name + ".scale"})
      if (reader_.has(candidate)) return candidate;
    return "";
  }

  /// Where the tensor is in this file; an empty name when it is nowhere.
  HfPlace find(const TensorSpec& spec) const {
    HfPlace place = hf_place(spec);
    if (reader_.has(place.name)) return place;
    if (place.is_stacked()) {
      // One matrix an expert, as checkpoints before the stacking have them.
      const size_t experts = place.name.rfind("experts.");
      const bool down = place.name.ends_with("down_proj");
      const char* projection = down ? "down_proj" : place.first_row > 0 ? "up_proj" : "gate_proj";
      place = {.name = concat(place.name.substr(0, experts), "experts.", place.expert, ".",
                              projection, ".weight")};
    } else if (const std::string older = older_hf_name(place.name); !older.empty()) {
      place.name = older;
    }
    if (!reader_.has(place.name)) place.name.clear();
    return place;
  }

  void check() const {
    std::vector<std::string> missing, wrong, unexpected;
    std::set<std::string> known;
    for (const TensorSpec& spec : tensor_table(config_)) {
      const HfPlace place = find(spec);
      if (place.name.empty()) {
        missing.push_back(hf_place(spec).name);
        continue;
      }
      known.insert(place.name);
      known.insert(scale_of(place.name));
      if (!fits(spec, place)) {
        wrong.push_back(concat(place.name, " is ", shape_text(reader_.info(place.name).shape), ", ",
                               spec.name, " is ", shape_text(spec.shape)));
      }
    }
    for (const std::string& name : reader_.names())
      if (!known.contains(name)) unexpected.push_back(name);
    refuse(missing, "tensors are missing");
    refuse(unexpected, "tensors are unexpected");
    refuse(wrong, "tensors have a wrong shape");
  }

  bool fits(const TensorSpec& spec, const HfPlace& place) const {
    const TensorInfo& info = reader_.info(place.name);
    const bool packed = info.dtype == Dtype::kI8 || info.dtype == Dtype::kU8;
    std::vector<int64_t> shape = info.shape;
    if (packed && is_quantised_role(spec.role) && !shape.empty()) shape.back() *= 2;
    const bool has_scale = !scale_of(place.name).empty();
    if ((packed || info.dtype == Dtype::kF8E4M3) && !has_scale) return false;
    if (!place.is_stacked()) return shape == spec.shape;
    return shape.size() == 3 && place.expert < shape[0] &&
           place.first_row + place.num_rows <= shape[1] && shape[2] == spec.shape[1];
  }

  void refuse(std::vector<std::string>& names, const char* what) const {
    const std::set<std::string> unique(names.begin(), names.end());
    names.assign(unique.begin(), unique.end());
    const size_t count = names.size();
    names.resize(std::min(count, kListed));
    HADAL_INPUT_CHECK(count == 0, reader_.path(), ": ", count, " ", what, ": ", join(names, "; "),
                      count > kListed ? "; ..." : "");
  }

  TensorReader reader_;
  model::ModelConfig config_;
};

std::unique_ptr<Input> open_input(const std::string& folder) {
  std::error_code ignored;
  HADAL_INPUT_CHECK(fs::is_directory(folder, ignored), folder, ": is no folder");
  TensorReader reader = TensorReader::open(folder);
  if (are_hf_names(reader.names())) return std::make_unique<HfInput>(folder, std::move(reader));
  return std::make_unique<OfficialInput>(folder);
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

/// A matrix in BF16, or any other tensor in the type it has for ever.
at::Tensor plain_value(const TensorSpec& spec, const CheckpointTensor& stored, Notes& notes) {
  const at::ScalarType type = scalar_type(stored_weight(spec, Storage::kBf16).dtype);
  const at::Tensor dense =
      is_quantised_role(spec.role) ? dense_values(stored.data, stored.scale) : stored.data;
  return to_type(dense, type, spec.name, notes);
}

class Bf16Output {
 public:
  Bf16Output(ShardWriter& writer, bool keep_scales) : writer_(writer), keep_(keep_scales) {}

  void add(const TensorSpec& spec, const CheckpointTensor& stored, Notes& notes) {
    writer_.add({.name = spec.name, .tensor = plain_value(spec, stored, notes)});
    if (!keep_ || !stored.scale.defined()) return;
    writer_.add({.name = scale_name(spec.name),
                 .tensor = stored.scale,
                 .e8m0 = stored.scale.scalar_type() == at::kByte});
    ++notes.report().kept_scales;
  }

 private:
  ShardWriter& writer_;
  bool keep_;
};

class HfOutput {
 public:
  HfOutput(ShardWriter& writer, int64_t num_experts) : writer_(writer), experts_(num_experts) {}

  void add(const TensorSpec& spec, const CheckpointTensor& stored, Notes& notes) {
    const HfPlace place = hf_place(spec);
    const at::Tensor value = plain_value(spec, stored, notes);
    if (!place.is_stacked()) {
      notes.report().mtp_beside_hf |= place.name.starts_with("mtp.");
      writer_.add({.name = place.name, .tensor = value});
      return;
    }
    at::Tensor& stack = stacks_[place.name];
    if (!stack.defined()) {
      const int64_t halves = place.name.ends_with("gate_up_proj") ? 2 : 1;
      stack = at::empty({experts_, halves * value.size(0), value.size(1)}, at::kBFloat16);
    }
    stack[place.expert].narrow(0, place.first_row, place.num_rows).copy_(value);
    // w3 of the last expert is the last matrix of a layer in the table.
    if (place.expert + 1 < experts_ || place.first_row == 0) return;
    for (auto& [name, tensor] : stacks_) writer_.add({.name = name, .tensor = tensor});
    stacks_.clear();
  }

 private:
  ShardWriter& writer_;
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
    QuantisedTensor codes{stored.data, stored.scale};
    if (!is_codes(stored.data)) codes = quantise(spec, stored, notes);
    if (codes.data.scalar_type() == at::kByte) codes.data = codes.data.view(at::kChar);
    writer_.add({.name = spec.name, .tensor = codes.data});
    writer_.add({.name = scale_name(spec.name),
                 .tensor = codes.scale,
                 .e8m0 = codes.scale.scalar_type() == at::kByte});
  }

 private:
  QuantisedTensor quantise(const TensorSpec& spec, const CheckpointTensor& stored, Notes& notes) {
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
Storage official_storage(const Input& input, const std::vector<TensorSpec>& table) {
  for (const TensorSpec& spec : table) {
    if (spec.role != TensorRole::kExpert) continue;
    const CheckpointTensor stored = input.get(spec);
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

/// The config of the input with the storage of the output; every other key as it is.
std::string edited_config(const std::string& folder, const std::optional<Storage>& official) {
  const std::string path = folder + "/config.json";
  auto json = nlohmann::ordered_json::parse(read_file(path, int64_t{1} << 24));
  if (!official) {
    json.erase("quantization_config");
    json.erase("expert_dtype");
    return json.dump(2) + "\n";
  }
  json["expert_dtype"] = *official == Storage::kFp4 ? "fp4" : "fp8";
  if (!json.contains("quantization_config")) {
    auto& quantisation = json["quantization_config"];
    quantisation["activation_scheme"] = "dynamic";
    quantisation["fmt"] = "e4m3";
    quantisation["quant_method"] = "fp8";
    if (*official != Storage::kFp8F32Scales) quantisation["scale_fmt"] = "ue8m0";
    quantisation["weight_block_size"] = {128, 128};
  }
  return json.dump(2) + "\n";
}

/// tokenizer.json, generation_config.json and whatever else lies beside the weights as JSON.
void copy_other_files(const std::string& from, const std::string& to) {
  for (const fs::directory_entry& entry : fs::directory_iterator(from)) {
    const std::string name = entry.path().filename().string();
    if (!entry.is_regular_file() || entry.path().extension() != ".json") continue;
    if (name == "config.json" || name == "model.safetensors.index.json") continue;
    write_file_atomic(to + "/" + name, read_file(entry.path().string()));
  }
}

}  // namespace

ConvertTarget parse_convert_target(const std::string& name) {
  if (name == "bf16") return ConvertTarget::kBf16;
  if (name == "official") return ConvertTarget::kOfficial;
  HADAL_INPUT_CHECK(name == "hf-bf16", "--to: expected bf16, official or hf-bf16, found '", name,
                    "'");
  return ConvertTarget::kHfBf16;
}

ConvertReport convert(const ConvertOptions& options) {
  const at::NoGradGuard no_grad;
  const std::unique_ptr<Input> input = open_input(options.in);
  const std::vector<TensorSpec> table = tensor_table(input->config());
  ConvertReport report;
  report.hf_input = input->is_hf();
  Notes notes(report);
  AtomicDirectory directory(options.out);
  ShardWriter writer(directory.temporary(), options.max_shard_bytes);
  const auto walk = [&](auto&& output) {
    for (const TensorSpec& spec : table) {
      output.add(spec, input->get(spec), notes);
      ++report.tensors;
      if (options.progress)
        options.progress(report.tensors, static_cast<int64_t>(table.size()), spec.name);
    }
  };
  std::optional<Storage> official;
  switch (options.target) {
    case ConvertTarget::kBf16:
      walk(Bf16Output(writer, !options.drop_scales));
      break;
    case ConvertTarget::kOfficial:
      official = official_storage(*input, table);
      if (*official != Storage::kFp8F32Scales) input->config().check_released();
      walk(OfficialOutput(writer, *official));
      break;
    case ConvertTarget::kHfBf16:
      walk(HfOutput(writer, input->config().n_routed_experts));
      break;
  }
  writer.finish();
  write_file_atomic(directory.temporary() + "/config.json", edited_config(options.in, official));
  copy_other_files(options.in, directory.temporary());
  directory.commit();
  return report;
}

}  // namespace hadal::checkpoint
