#include "checkpoint/official.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/join.h"
#include "base/log.h"

namespace hadal::checkpoint {
namespace {

constexpr size_t kListed = 20;  // tensors named in one message

/// The name under which the scale of this weight is stored, or "".
std::string stored_scale_name(const TensorReader& reader, const std::string& weight) {
  if (!weight.ends_with(".weight")) return "";
  for (const std::string& name : {scale_name(weight), weight + "_scale_inv"})
    if (reader.has(name)) return name;
  return "";
}

bool is_ignored(const std::string& name) {
  return name == "mtp.0.emb.tok_emb.weight" || name == "mtp.0.head.weight";
}

/// Types that hold the same bytes.
bool same_dtype(Dtype found, Dtype expected) {
  if (found == expected) return true;
  return found == Dtype::kU8 && (expected == Dtype::kI8 || expected == Dtype::kF8E8M0);
}

std::string describe(Dtype dtype, const std::vector<int64_t>& shape) {
  return concat(dtype_name(dtype), " ", shape_text(shape));
}

/// Problems of one kind, of which the first few are named.
class Problems {
 public:
  void add(std::string text) {
    if (++count_ <= kListed) listed_.push_back(std::move(text));
  }
  void check(const std::string& path, const char* what) const {
    HADAL_INPUT_CHECK(count_ == 0, path, ": ", count_, " ", what, ": ", join(listed_, "; "),
                      count_ > kListed ? "; ..." : "");
  }

 private:
  size_t count_ = 0;
  std::vector<std::string> listed_;
};

void compare(const TensorReader& reader,
             const std::string& name,
             const StoredTensor& expected,
             bool or_f32,
             Problems& wrong) {
  const TensorInfo& found = reader.info(name);
  const bool dtype_fits =
      same_dtype(found.dtype, expected.dtype) || (or_f32 && found.dtype == Dtype::kF32);
  if (!dtype_fits || found.shape != expected.shape)
    wrong.add(concat(name, " is ", describe(found.dtype, found.shape), ", expected ",
                     describe(expected.dtype, expected.shape)));
}

/// Names, types and shapes of all tensors against the table.
void check_tensors(const TensorReader& reader,
                   const std::vector<TensorSpec>& table,
                   Storage storage) {
  Problems missing, wrong, unexpected;
  std::set<std::string> known;
  for (const TensorSpec& spec : table) {
    known.insert(spec.name);
    if (!reader.has(spec.name)) {
      missing.add(spec.name);
      continue;
    }
    // A master checkpoint of our own may keep every BF16 tensor in F32.
    const bool or_f32 = storage == Storage::kBf16;
    compare(reader, spec.name, stored_weight(spec, storage), or_f32, wrong);
    const std::string scale = stored_scale_name(reader, spec.name);
    if (!scale.empty()) known.insert(scale);
    if (const auto expected = stored_scale(spec, storage)) {
      if (scale.empty())
        missing.add(scale_name(spec.name));
      else
        compare(reader, scale, *expected, false, wrong);
    }
  }
  for (const std::string& name : reader.names())
    if (!known.contains(name) && !is_ignored(name)) unexpected.add(name);
  missing.check(reader.path(), "tensors are missing");
  unexpected.check(reader.path(), "tensors are unexpected");
  wrong.check(reader.path(), "tensors have a wrong type or shape");
}

bool has_nan_scale(const at::Tensor& scale) {
  if (scale.scalar_type() == at::kByte)
    return std::memchr(scale.const_data_ptr(), 255, static_cast<size_t>(scale.numel())) != nullptr;
  const auto* values = scale.const_data_ptr<float>();
  return std::any_of(values, values + scale.numel(), [](float x) { return !std::isfinite(x); });
}

/// Why this table of experts cannot be used, or "".
std::string expert_table_problem(const at::Tensor& table, int64_t num_experts) {
  const auto* ids = table.const_data_ptr<int64_t>();  // [vocab, topk]
  const int64_t topk = table.size(1);
  for (int64_t token = 0; token < table.size(0); ++token)
    for (int64_t i = 0; i < topk; ++i) {
      const int64_t* row = ids + token * topk;
      if (row[i] < 0 || row[i] >= num_experts)
        return concat("token ", token, " has expert ", row[i], " of ", num_experts);
      if (std::find(row, row + i, row[i]) != row + i)
        return concat("token ", token, " has expert ", row[i], " twice");
    }
  return "";
}

void check_values(const TensorReader& reader,
                  const std::vector<TensorSpec>& table,
                  const model::ModelConfig& config,
                  Storage storage) {
  Problems scales, experts;
  for (const TensorSpec& spec : table) {
    if (stored_scale(spec, storage)) {
      const std::string name = stored_scale_name(reader, spec.name);
      if (has_nan_scale(reader.tensor(name))) scales.add(name);
    }
    if (spec.role != TensorRole::kI64) continue;
    const std::string problem =
        expert_table_problem(reader.tensor(spec.name), config.n_routed_experts);
    if (!problem.empty()) experts.add(spec.name + ": " + problem);
  }
  scales.check(reader.path(), "scales hold NaN or infinity");
  experts.check(reader.path(), "expert tables are wrong");
}

}  // namespace

Storage detect_storage(const TensorReader& reader) {
  const std::string name = "layers.0.ffn.experts.0.w1.weight";
  const Dtype expert = reader.info(name).dtype;
  if (expert == Dtype::kI8 || expert == Dtype::kU8) return Storage::kFp4;
  if (expert == Dtype::kBf16 || expert == Dtype::kF32) return Storage::kBf16;
  HADAL_INPUT_CHECK(expert == Dtype::kF8E4M3, reader.path(), ": ", name, " has type ",
                    dtype_name(expert), ", expected I8, U8, F8_E4M3, BF16 or F32");
  const std::string scale = stored_scale_name(reader, name);
  HADAL_INPUT_CHECK(!scale.empty(), reader.path(), ": ", name, " is FP8 but has no scale");
  return reader.info(scale).dtype == Dtype::kF32 ? Storage::kFp8F32Scales : Storage::kFp8;
}

OfficialCheckpoint::OfficialCheckpoint(TensorReader reader, model::ModelConfig config)
    : reader_(std::move(reader)), config_(std::move(config)), storage_(detect_storage(reader_)) {}

OfficialCheckpoint OfficialCheckpoint::open(const std::string& folder) {
  OfficialCheckpoint result(TensorReader::open(folder), model::load_config(folder));
  model::ModelConfig& config = result.config_;
  const auto names = result.reader_.names();
  const bool has_mtp = std::any_of(names.begin(), names.end(), [](const std::string& name) {
    return name.starts_with("mtp.") && !is_ignored(name);
  });
  if (config.n_mtp_layers == 1 && !has_mtp) {
    log::warn("checkpoint", folder, ": the config names an MTP block, the files hold none");
    config.n_mtp_layers = 0;
    config.compress_ratios.pop_back();
  }
  config.quantized = result.storage_ != Storage::kBf16;
  config.expert_dtype = result.storage_ == Storage::kFp4    ? model::ExpertDtype::kFp4
                        : result.storage_ == Storage::kBf16 ? model::ExpertDtype::kBf16
                                                            : model::ExpertDtype::kFp8;
  const auto table = tensor_table(config);
  check_tensors(result.reader_, table, result.storage_);
  check_values(result.reader_, table, config, result.storage_);
  return result;
}

CheckpointTensor OfficialCheckpoint::get(const std::string& name) const {
  CheckpointTensor result{reader_.tensor(name), {}};
  const std::string scale = stored_scale_name(reader_, name);
  if (!scale.empty()) result.scale = reader_.tensor(scale);
  return result;
}

}  // namespace hadal::checkpoint
