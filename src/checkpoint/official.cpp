#include "checkpoint/official.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/log.h"
#include "base/parallel.h"
#include "checkpoint/problems.h"

namespace hadal::checkpoint {
namespace {

/// The name under which the scale of this weight is stored, or "".
std::string stored_scale_name(const TensorReader& reader, const std::string& weight) {
  if (reader.has(hf_scale_name(weight))) return hf_scale_name(weight);
  const std::string name = weight.ends_with(".weight") ? scale_name(weight) : weight + ".scale";
  return reader.has(name) ? name : "";
}

bool is_ignored(const std::string& name) {
  return name == "mtp.0.emb.tok_emb.weight" || name == "mtp.0.head.weight";
}

/// Types that hold the same bytes.
bool same_dtype(Dtype found, Dtype expected) {
  if (found == expected) return true;
  return found == Dtype::kU8 && (expected == Dtype::kI8 || expected == Dtype::kF8E8M0);
}

bool is_plain(Dtype dtype) {
  return dtype == Dtype::kF32 || dtype == Dtype::kBf16 || dtype == Dtype::kF16;
}

std::string describe(Dtype dtype, const std::vector<int64_t>& shape) {
  return concat(dtype_name(dtype), " ", shape_text(shape));
}

/// The shape of the whole tensor in the file whose part, or all, has shape `part`.
std::vector<int64_t> whole_shape(const HfPlace& place,
                                 const model::ModelConfig& config,
                                 std::vector<int64_t> part) {
  if (!place.is_stacked()) return part;
  const int64_t parts = place.name.ends_with("down_proj") ? 1 : 2;
  return {config.n_routed_experts, parts * part.at(0), part.at(1)};
}

/// What the files and the config are to agree on about a weight.
class TensorCheck {
 public:
  TensorCheck(const TensorReader& reader,
              const model::ModelConfig& config,
              Storage storage,
              Naming naming)
      : reader_(reader), config_(config), storage_(storage), naming_(naming) {}

  void check(const TensorSpec& spec, const HfPlace& place) {
    known_.insert(place.name);
    const std::string scale = stored_scale_name(reader_, place.name);
    if (!scale.empty()) known_.insert(scale);
    const Dtype found = reader_.info(place.name).dtype;
    const Storage storage = storage_here(spec, found);
    StoredTensor expected = stored_weight(spec, storage);
    // Without quantisation any float type serves, and none of our readers rounds it.
    if (storage == Storage::kBf16 && is_plain(expected.dtype) && is_plain(found)) {
      if (spec.role == TensorRole::kF32 && found != Dtype::kF32) narrowed_.add(place.name);
      expected.dtype = found;
    }
    compare(place.name, {expected.dtype, whole_shape(place, config_, expected.shape)});
    const auto expected_scale = stored_scale(spec, storage);
    if (!expected_scale) return;
    if (scale.empty())
      missing.add(place.name.ends_with(".weight") ? scale_name(place.name)
                                                  : hf_scale_name(place.name));
    else
      compare(scale, {expected_scale->dtype, whole_shape(place, config_, expected_scale->shape)});
  }

  void finish() {
    for (const std::string& name : reader_.names())
      if (!known_.contains(name) && !is_ignored(name)) unexpected_.add(name);
    missing.refuse(reader_.path(), "tensors are missing");
    unexpected_.refuse(reader_.path(), "tensors are unexpected");
    wrong_.refuse(reader_.path(), "tensors have a wrong type or shape");
    narrowed_.warn(reader_.path(), "tensors that the release keeps in F32 are stored in less");
  }

  Problems missing;

 private:
  /// Under official names one storage holds for all; reposts under other names quantise some
  /// matrices and leave others.
  Storage storage_here(const TensorSpec& spec, Dtype found) const {
    const bool matrix = spec.role == TensorRole::kMatrix || spec.role == TensorRole::kExpert;
    if (naming_ == Naming::kOfficial || naming_ == Naming::kPrefixed || !matrix) return storage_;
    if (is_plain(found)) return Storage::kBf16;
    if (found == Dtype::kF8E4M3 && storage_ == Storage::kFp4 && spec.role == TensorRole::kExpert)
      return Storage::kFp8;
    return storage_ == Storage::kBf16 ? Storage::kFp8 : storage_;
  }

  void compare(const std::string& name, const StoredTensor& expected) {
    const TensorInfo& found = reader_.info(name);
    if (!same_dtype(found.dtype, expected.dtype) || found.shape != expected.shape)
      wrong_.add(concat(name, " is ", describe(found.dtype, found.shape), ", expected ",
                        describe(expected.dtype, expected.shape)));
  }

  const TensorReader& reader_;
  const model::ModelConfig& config_;
  Storage storage_;
  Naming naming_;
  Problems wrong_, unexpected_, narrowed_;
  std::set<std::string> known_;
};

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

void check_values(const OfficialCheckpoint& checkpoint, const std::vector<TensorSpec>& table) {
  std::vector<uint8_t> nan(table.size());
  parallel_for(std::ssize(table), 16, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      if (!stored_scale(table[i], Storage::kFp8)) continue;
      const CheckpointTensor tensor = checkpoint.get(table[i].name);
      nan[i] = tensor.scale.defined() && has_nan_scale(tensor.scale);
    }
  });
  Problems scales, experts;
  for (size_t i = 0; i < table.size(); ++i) {
    const TensorSpec& spec = table[i];
    if (nan[i] != 0) scales.add(checkpoint.described_scale(spec.name));
    if (spec.role != TensorRole::kI64) continue;
    const std::string problem =
        expert_table_problem(checkpoint.get(spec.name).data, checkpoint.config().n_routed_experts);
    if (!problem.empty()) experts.add(spec.name + ": " + problem);
  }
  scales.refuse(checkpoint.reader().path(), "scales hold NaN or infinity");
  experts.refuse(checkpoint.reader().path(), "expert tables are wrong");
}

/// What the files hold under mtp.*.
struct MtpTensors {
  int64_t stages = 0;   ///< largest k of mtp.k. + 1
  std::string block;    ///< a tensor that only the preview's MTP block has
  std::string drafter;  ///< one that only a DSpark drafter has
};

MtpTensors find_mtp(const std::vector<std::string>& names) {
  MtpTensors found;
  for (const std::string& full : names) {
    const std::string name = full.starts_with("model.mtp.") ? full.substr(6) : full;
    if (!name.starts_with("mtp.") || is_ignored(name)) continue;
    int64_t stage = -1;
    std::from_chars(name.data() + 4, name.data() + name.size(), stage);
    found.stages = std::max(found.stages, stage + 1);
    if (name == "mtp.0.e_proj.weight") found.block = full;
    if (name == "mtp.0.main_proj.weight") found.drafter = full;
  }
  return found;
}

/// Lets the tensors say which MTP block or drafter there is; where config and tensors contradict
/// each other, the error names both.
void settle_mtp(const TensorReader& reader, const std::string& folder, model::ModelConfig& config) {
  const MtpTensors found = find_mtp(reader.names());
  model::DsparkConfig& drafter = config.drafter;
  HADAL_INPUT_CHECK(drafter.exists() || found.drafter.empty(), folder, ": the files hold ",
                    found.drafter, ", a DSpark drafter, but the config has no dspark_block_size");
  HADAL_INPUT_CHECK(!drafter.exists() || found.block.empty(), folder,
                    ": the config has dspark_block_size ", drafter.block_size,
                    ", a DSpark drafter, but the files hold ", found.block,
                    ", an MTP block of the preview");
  if (drafter.exists() && found.stages > 0) {
    if (drafter.n_stages == 0) drafter.n_stages = found.stages;
    HADAL_INPUT_CHECK(found.stages == drafter.n_stages, folder, ": the config has ",
                      drafter.n_stages, " stages of a drafter (compress_ratios), the files hold ",
                      found.stages, " (mtp.", found.stages - 1, ".*)");
  } else if (drafter.exists()) {
    log::warn("checkpoint", folder, ": the config names a drafter, the files hold none");
    drafter = {};
  } else if (config.n_mtp_layers == 1 && found.stages == 0) {
    log::warn("checkpoint", folder, ": the config names an MTP block, the files hold none");
    config.n_mtp_layers = 0;
    config.compress_ratios.pop_back();
  }
}

/// How the quantised tensors of these files are stored: by the first expert's first matrix.
Storage detect_storage(const TensorReader& reader, const std::string& name) {
  const Dtype expert = reader.info(name).dtype;
  if (expert == Dtype::kI8 || expert == Dtype::kU8) return Storage::kFp4;
  if (is_plain(expert)) return Storage::kBf16;
  HADAL_INPUT_CHECK(expert == Dtype::kF8E4M3, reader.path(), ": ", name, " has type ",
                    dtype_name(expert), ", expected I8, U8, F8_E4M3, BF16, F16 or F32");
  const std::string scale = stored_scale_name(reader, name);
  HADAL_INPUT_CHECK(!scale.empty(), reader.path(), ": ", name, " is FP8 but has no scale");
  return reader.info(scale).dtype == Dtype::kF32 ? Storage::kFp8F32Scales : Storage::kFp8;
}

}  // namespace

OfficialCheckpoint::OfficialCheckpoint(TensorReader reader, model::ModelConfig config)
    : reader_(std::move(reader)), config_(std::move(config)), naming_(naming_of(reader_.names())) {}

void OfficialCheckpoint::find_places(const std::vector<TensorSpec>& table) {
  const std::vector<std::string> names = reader_.names();
  std::map<std::string, std::string> by_official;
  // The file's own name wins where it is official; a second tensor of one meaning is unexpected.
  for (const std::string& name : names) {
    const auto [entry, fresh] = by_official.emplace(official_name(name), name);
    if (!fresh && name == entry->first) entry->second = name;
  }
  for (const TensorSpec& spec : table) {
    if (const auto found = by_official.find(spec.name); found != by_official.end()) {
      places_.emplace(spec.name, HfPlace{.name = found->second});
      continue;
    }
    HfPlace place = hf_place(spec);
    if (!place.is_stacked()) continue;
    const bool down = place.name.ends_with("down_proj");
    const auto stacked =
        by_official.find(concat("layers.", spec.block, ".ffn.experts.*.", down ? "w2" : "w13"));
    if (stacked == by_official.end()) continue;
    place.name = stacked->second;
    places_.emplace(spec.name, place);
  }
  HADAL_INPUT_CHECK(!places_.empty(), reader_.path(), ": ", names.size(),
                    " tensors, none of them called as a V4's",
                    names.empty() ? "" : concat("; the first is ", names.front()), ", expected ",
                    naming_name(Naming::kOfficial), " (layers.0.attn.wq_a.weight), ",
                    naming_name(Naming::kPrefixed), ", ", naming_name(Naming::kHfModules),
                    " (model.layers.0.self_attn.q_a_proj.weight) or ",
                    naming_name(Naming::kHfSaved));
}

OfficialCheckpoint OfficialCheckpoint::open(const std::string& folder) {
  OfficialCheckpoint result(TensorReader::open(folder), model::load_config(folder));
  model::ModelConfig& config = result.config_;
  settle_mtp(result.reader_, folder, config);
  const auto table = tensor_table(config);
  result.find_places(table);
  const auto expert = result.places_.find("layers.0.ffn.experts.0.w1.weight");
  if (expert != result.places_.end())
    result.storage_ = detect_storage(result.reader_, expert->second.name);
  config.quantized = result.storage_ != Storage::kBf16;
  config.expert_dtype = result.storage_ == Storage::kFp4    ? model::ExpertDtype::kFp4
                        : result.storage_ == Storage::kBf16 ? model::ExpertDtype::kBf16
                                                            : model::ExpertDtype::kFp8;
  TensorCheck check(result.reader_, config, result.storage_, result.naming_);
  for (const TensorSpec& spec : table) {
    const auto found = result.places_.find(spec.name);
    if (found == result.places_.end())
      check.missing.add(expected_name(spec, result.naming_));
    else
      check.check(spec, found->second);
  }
  check.finish();
  check_values(result, table);
  return result;
}

const HfPlace& OfficialCheckpoint::place(const std::string& name) const {
  const auto found = places_.find(name);
  HADAL_CHECK(found != places_.end(), reader_.path(), ": no tensor ", name);
  return found->second;
}

std::string OfficialCheckpoint::described(const std::string& name) const {
  const HfPlace& where = place(name);
  return where.is_stacked() ? concat(where.name, "[", where.expert, "]") : where.name;
}

std::string OfficialCheckpoint::described_scale(const std::string& name) const {
  const HfPlace& where = place(name);
  const std::string scale = stored_scale_name(reader_, where.name);
  return where.is_stacked() ? concat(scale, "[", where.expert, "]") : scale;
}

CheckpointTensor OfficialCheckpoint::get(const std::string& name) const {
  const HfPlace& where = place(name);
  CheckpointTensor result{reader_.tensor(where.name), {}};
  const std::string scale = stored_scale_name(reader_, where.name);
  if (!scale.empty()) result.scale = reader_.tensor(scale);
  if (!where.is_stacked()) return result;
  result.data = result.data[where.expert].narrow(0, where.first_row, where.num_rows);
  if (result.scale.defined()) {
    // Scale rows are 128 weight rows each (FP8), or one (FP4).
    const at::Tensor all = result.scale[where.expert];
    const int64_t rows = reader_.info(where.name).shape[1];
    const int64_t rows_each = all.size(0) * 128 <= rows + 127 ? 128 : 1;
    result.scale =
        all.narrow(0, where.first_row / rows_each, (where.num_rows + rows_each - 1) / rows_each);
  }
  return result;
}

}  // namespace hadal::checkpoint
