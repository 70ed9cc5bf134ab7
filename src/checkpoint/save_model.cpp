#include "checkpoint/save_model.h"

#include <map>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "base/file.h"
#include "checkpoint/dequantise.h"
#include "checkpoint/names.h"
#include "checkpoint/quantise.h"
#include "checkpoint/safetensors.h"

namespace hadal::checkpoint {
namespace {

/// Values by official name; the matrices of stacked experts one by one.
std::map<std::string, at::Tensor> values_by_name(const model::Transformer& model) {
  std::map<std::string, at::Tensor> values;
  model.visit([&](const model::Parameter& parameter) {
    HADAL_CHECK(parameter.value.defined(), "save_model: ", parameter.name, " has no dense values");
    HADAL_CHECK(parameter.shard.whole(), "save_model: of ", parameter.name,
                " there is a part only");
    const at::Tensor value = parameter.value.detach();
    const size_t star = parameter.name.find('*');
    if (star == std::string::npos) {
      values[parameter.name] = value;
      return;
    }
    for (int64_t expert = 0; expert < value.size(0); ++expert) {
      std::string name = parameter.name;
      name.replace(star, 1, std::to_string(expert));
      values[name] = value.select(0, expert);
    }
  });
  return values;
}

void add_tensor(ShardWriter& writer,
                const TensorSpec& spec,
                Storage storage,
                const at::Tensor& value) {
  const StoredTensor stored = stored_weight(spec, storage);
  HADAL_CHECK(value.sizes() == at::IntArrayRef(spec.shape), "save_model: ", spec.name, " is ",
              value.sizes(), ", expected ", at::IntArrayRef(spec.shape));
  if (stored.dtype == Dtype::kF8E4M3 || stored.dtype == Dtype::kI8) {
    const ops::StoredCodes quantised = stored.dtype == Dtype::kI8 ? quantise_fp4(value, spec.name)
                                                                  : quantise_fp8(value, spec.name);
    writer.add({.name = spec.name, .tensor = quantised.data});
    const bool e8m0 = storage != Storage::kFp8F32Scales;
    writer.add({.name = scale_name(spec.name),
                .tensor = e8m0 ? quantised.scale : e8m0_to_float(quantised.scale),
                .e8m0 = e8m0});
    return;
  }
  const at::Tensor plain = value.cpu().to(scalar_type(stored.dtype)).contiguous();
  HADAL_INPUT_CHECK(!plain.is_floating_point() || at::isfinite(plain).all().item<bool>(), spec.name,
                    ": holds values that are not finite");
  writer.add({.name = spec.name, .tensor = plain});
}

}  // namespace

void save_model(const model::Transformer& model,
                const std::string& folder,
                const SaveOptions& options) {
  const at::NoGradGuard no_grad;
  model::ModelConfig config = model.config();
  const bool official = options.format == SaveFormat::kOfficial;
  config.drafter = {};
  if (options.trained_length >= 0) config.trained_length = options.trained_length;
  config.quantized = official;
  config.expert_dtype = official ? options.experts : model::ExpertDtype::kBf16;
  if (official) config.check_stored();
  const Storage storage = storage_of(config);
  const std::map<std::string, at::Tensor> values = values_by_name(model);
  AtomicDirectory directory(folder);
  ShardWriter writer(directory.temporary(), options.max_shard_bytes);
  for (const TensorSpec& spec : tensor_table(config)) {
    const auto found = values.find(spec.name);
    HADAL_CHECK(found != values.end(), "save_model: the model has no ", spec.name);
    add_tensor(writer, spec, storage, found->second);
  }
  writer.finish();
  write_file_atomic(directory.temporary() + "/config.json", model::to_config_json(config));
  if (!options.generation_config.empty()) {
    write_file_atomic(directory.temporary() + "/generation_config.json",
                      read_file(options.generation_config));
  }
  if (!options.tokenizer.empty()) {
    write_file_atomic(directory.temporary() + "/tokenizer.json", read_file(options.tokenizer));
  }
  directory.commit();
}

}  // namespace hadal::checkpoint
