#include "ops/gemm/weight.h"

#include <atomic>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/log.h"
#include "ops/gemm/sm90_products.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

at::Tensor as_matrices(const at::Tensor& values, int64_t matrices) {
  return values.reshape({matrices, -1, values.size(-1)});
}

/// On the CPU, and for what no Hopper kernel does.
void warn_made_dense() {
  static std::atomic<bool> said = false;
  if (said.exchange(true)) return;
  log::warn(
      "ops",
      "no kernel of this device does a product with weights as they are held; each such product "
      "makes them dense first, which is slow");
}

/// Codes of values that lie on the grid of `storage`; nullopt for others. Zeros keep their sign,
/// which roundings lose.
std::optional<StoredCodes> exact_codes(const at::Tensor& w, OfficialStorage storage) {
  if (!at::equal(official_rounding(w, storage).to(at::kDouble), w.to(at::kDouble)))
    return std::nullopt;
  StoredCodes codes = official_codes(w, storage);
  const at::Tensor sign = at::signbit(w).to(at::kByte);
  if (storage == OfficialStorage::kFp8) {
    codes.data = codes.data.view(at::kByte).bitwise_or(sign * 128).view(at::kFloat8_e4m3fn);
  } else {
    const at::Tensor pairs = sign.reshape({w.size(0), w.size(1) / 2, 2});
    codes.data =
        codes.data.view(at::kByte).bitwise_or(pairs.select(2, 0) * 8 + pairs.select(2, 1) * 128);
  }
  return codes;
}

/// For messages.
std::string held_as(const Weight& w) {
  switch (w.form()) {
    case WeightForm::kSm90:
      return w.sm90().format == WeightFormat::kBf16  ? "in BF16"
             : w.sm90().format == WeightFormat::kFp4 ? "in FP4"
                                                     : "in FP8";
    case WeightForm::kPanels:
      return "in panels";
    default:
      return concat("held dense in ", w.defined() ? toString(w.dense().scalar_type()) : "nothing");
  }
}

void check_device(const at::Tensor& x, const Weight& w, const char* op) {
  HADAL_CHECK(x.device() == w.device(), op, ": x on ", x.device(), ", w on ", w.device());
}

}  // namespace

PanelCache::PanelCache() : source_(c10::intrusive_ptr<c10::TensorImpl>()) {}

std::shared_ptr<const Panels> PanelCache::of(const at::Tensor& values, int64_t matrices) {
  const uint32_t version = values.is_inference() ? 0 : static_cast<uint32_t>(values._version());
  const std::scoped_lock lock(mutex_);
  const bool same = panels_ != nullptr && !source_.expired() &&
                    source_._unsafe_get_target() == values.unsafeGetTensorImpl() &&
                    version_ == version && panels_->matrices == matrices;
  if (!same) {
    panels_.reset();
    panels_ = std::make_shared<const Panels>(pack_panels(as_matrices(values, matrices)));
    source_ = c10::weak_intrusive_ptr<c10::TensorImpl>(values.getIntrusivePtr());
    version_ = version;
  }
  return panels_;
}

int64_t PanelCache::num_bytes() const {
  const std::scoped_lock lock(mutex_);
  return panels_ == nullptr ? 0 : panels_->num_bytes();
}

Weight::Weight(at::Tensor values)
    : storage_(Dense{.values = std::move(values), .source = {}, .cache = nullptr}) {
  HADAL_CHECK(dense().dim() == 2 || dense().dim() == 3, "weight: values of shape ",
              dense().sizes());
}

Weight::Weight(const at::Tensor& values, int64_t matrices, std::shared_ptr<PanelCache> cache)
    : storage_(Dense{
          .values = as_matrices(values, matrices), .source = values, .cache = std::move(cache)}) {}

Weight::Weight(Panels panels) : storage_(std::make_shared<const Panels>(std::move(panels))) {}

Weight::Weight(Sm90Matrices matrices)
    : storage_(std::make_shared<const Sm90Matrices>(std::move(matrices))) {}

const at::Tensor& Weight::dense() const {
  const auto* held = std::get_if<Dense>(&storage_);
  HADAL_CHECK(held != nullptr, "weight: not dense");
  return held->values;
}
const Panels& Weight::panels() const {
  const auto* held = std::get_if<std::shared_ptr<const Panels>>(&storage_);
  HADAL_CHECK(held != nullptr, "weight: not in panels");
  return **held;
}
const Sm90Matrices& Weight::sm90() const {
  const auto* held = std::get_if<std::shared_ptr<const Sm90Matrices>>(&storage_);
  HADAL_CHECK(held != nullptr, "weight: not in the layout of sm90");
  return **held;
}

std::shared_ptr<const Panels> Weight::kernel_panels() const {
  if (const auto* held = std::get_if<std::shared_ptr<const Panels>>(&storage_)) return *held;
  const auto* held = std::get_if<Dense>(&storage_);
  if (held == nullptr || held->cache == nullptr) return nullptr;
  return held->cache->of(held->source, matrices());
}

int64_t Weight::matrices() const {
  switch (form()) {
    case WeightForm::kDense:
      return dense().dim() == 3 ? dense().size(0) : 1;
    case WeightForm::kPanels:
      return panels().matrices;
    case WeightForm::kSm90:
      return sm90().matrices;
    case WeightForm::kNone:
      break;
  }
  return 0;
}

int64_t Weight::out() const {
  switch (form()) {
    case WeightForm::kDense:
      return dense().size(-2);
    case WeightForm::kPanels:
      return panels().out;
    case WeightForm::kSm90:
      return sm90().out;
    case WeightForm::kNone:
      break;
  }
  return 0;
}

int64_t Weight::in() const {
  switch (form()) {
    case WeightForm::kDense:
      return dense().size(-1);
    case WeightForm::kPanels:
      return panels().in;
    case WeightForm::kSm90:
      return sm90().in;
    case WeightForm::kNone:
      break;
  }
  return 0;
}

at::Device Weight::device() const {
  switch (form()) {
    case WeightForm::kDense:
      return dense().device();
    case WeightForm::kSm90:
      return sm90().data.device();
    default:
      return at::kCPU;
  }
}

int64_t Weight::num_bytes() const {
  switch (form()) {
    case WeightForm::kDense:
      return static_cast<int64_t>(dense().nbytes());
    case WeightForm::kPanels:
      return panels().num_bytes();
    case WeightForm::kSm90:
      return sm90().num_bytes();
    case WeightForm::kNone:
      break;
  }
  return 0;
}

at::Tensor Weight::values(int64_t matrix) const {
  HADAL_CHECK(matrix >= 0 && matrix < matrices(), "weight: matrix ", matrix, " of ", matrices());
  switch (form()) {
    case WeightForm::kDense:
      return dense().dim() == 3 ? dense().select(0, matrix) : dense();
    case WeightForm::kSm90:
      return unpack_sm90(sm90(), matrix);
    default:
      return unpack_panels(panels())[matrix];
  }
}

at::Tensor Weight::values() const {
  switch (form()) {
    case WeightForm::kDense:
      return dense().dim() == 3 ? dense() : dense().unsqueeze(0);
    case WeightForm::kPanels:
      return unpack_panels(panels());
    case WeightForm::kSm90: {
      const at::Tensor all =
          at::empty({matrices(), out(), in()}, sm90().data.options().dtype(at::kBFloat16));
      for (int64_t matrix = 0; matrix < matrices(); ++matrix)
        all.select(0, matrix).copy_(unpack_sm90(sm90(), matrix));
      return all;
    }
    case WeightForm::kNone:
      break;
  }
  throw Error("weight: has no values");
}

Weight Weight::to_dense() const {
  return form() == WeightForm::kDense ? Weight(dense()) : Weight(values());
}

Weight Weight::to_panels() const {
  return form() == WeightForm::kPanels ? *this : Weight(pack_panels(values()));
}

std::optional<Weight> Weight::to_sm90(OfficialStorage storage, GemmRole role) const {
  std::optional<Sm90Matrices> packed;
  if (form() == WeightForm::kSm90) return *this;
  if (form() == WeightForm::kPanels && panels().format == WeightFormat::kBf16)
    return Weight(values()).to_sm90(OfficialStorage::kBf16, role);
  const bool widened = role == GemmRole::kBf16;
  if (form() == WeightForm::kPanels) {
    const WeightFormat format = panels().format;
    if (format == WeightFormat::kF32 || panels().has_factors()) return std::nullopt;
    packed = pack_sm90(panels(), widened);
  } else if (storage == OfficialStorage::kBf16) {
    if (dense().scalar_type() != at::kBFloat16) return std::nullopt;
    packed = pack_sm90_bf16(dense().detach().cpu());
  } else {
    const bool fp4 = storage == OfficialStorage::kFp4;
    if (fp4 ? in() % 32 != 0 : storage != OfficialStorage::kFp8) return std::nullopt;
    std::vector<at::Tensor> data, scale;
    for (int64_t matrix = 0; matrix < matrices(); ++matrix) {
      std::optional<StoredCodes> codes = exact_codes(values(matrix).detach().cpu(), storage);
      if (!codes) return std::nullopt;
      data.push_back(std::move(codes->data));
      scale.push_back(std::move(codes->scale));
    }
    packed = fp4       ? pack_sm90_fp4(data, scale)
             : widened ? pack_sm90_widened(data, scale)
                       : pack_sm90_fp8(data, scale);
  }
  if (!packed) return std::nullopt;
  return Weight(std::move(*packed));
}

Weight Weight::to(at::Device device, GemmRole role) const {
  switch (form()) {
    case WeightForm::kDense:
      return Weight(dense().to(device));
    case WeightForm::kSm90:
      return Weight(sm90().to(device));
    case WeightForm::kPanels: {
      if (device.is_cpu()) return *this;
      if (const auto packed = to_sm90(OfficialStorage::kBf16, role)) return packed->to(device);
      if (panels().format == WeightFormat::kFp8 || panels().format == WeightFormat::kFp4) {
        log::warn("ops", "FP8 or FP4 weights that ", device.str(),
                  " has no form for are held in BF16 there");
      }
      return Weight(values().to(device));
    }
    case WeightForm::kNone:
      break;
  }
  return {};
}

at::Tensor linear(const at::Tensor& x, const Weight& w, GemmRole role) {
  check_device(x, w, "linear");
  HADAL_CHECK(w.matrices() == 1, "linear: ", w.matrices(), " matrices");
  const bool sm90 = w.form() == WeightForm::kSm90;
  if (sm90 && use_sm90(x) && serves_linear_sm90(w.sm90(), role))
    return linear_sm90(x, w.sm90(), role);
  if (as_hopper())
    refuse_as_hopper(x, concat("linear of weights [", w.out(), ", ", w.in(), "] ", held_as(w)));
  if (serves_panels(x)) {
    if (const auto panels = w.kernel_panels()) return linear(x, *panels, role);
  }
  if (sm90) warn_made_dense();
  return linear(x, w.values(0), role);
}

at::Tensor grouped_linear(const at::Tensor& x,
                          const Weight& w,
                          const at::Tensor& offsets,
                          GemmRole role) {
  check_device(x, w, "grouped_linear");
  const bool sm90 = w.form() == WeightForm::kSm90;
  if (sm90 && use_sm90(x) && serves_grouped_sm90(w.sm90()))
    return grouped_linear_sm90(x, w.sm90(), offsets);
  if (as_hopper())
    refuse_as_hopper(x, concat("experts of weights [", w.out(), ", ", w.in(), "] ", held_as(w)));
  if (serves_panels(x)) {
    if (const auto panels = w.kernel_panels()) return grouped_linear(x, *panels, offsets, role);
  }
  if (!sm90) return grouped_linear(x, w.values(), offsets, role);
  warn_made_dense();
  check_shape(x, {-1, w.in()}, "grouped_linear: x");
  check_shape(offsets, {w.matrices() + 1}, "grouped_linear: offsets");
  const at::Tensor bounds = offsets.to(at::kCPU);
  const auto* bound = bounds.const_data_ptr<int64_t>();
  std::vector<at::Tensor> parts;
  for (int64_t expert = 0; expert < w.matrices(); ++expert) {
    const int64_t rows = bound[expert + 1] - bound[expert];
    if (rows > 0) parts.push_back(linear(x.narrow(0, bound[expert], rows), w.values(expert), role));
  }
  if (parts.empty()) return linear(x, w.values(0), role);
  return at::cat(parts);
}

at::Tensor group_linear(const at::Tensor& x, const Weight& w) {
  check_device(x, w, "group_linear");
  const bool sm90 = w.form() == WeightForm::kSm90;
  if (sm90 && use_sm90(x) && serves_groups_sm90(w.sm90())) return group_linear_sm90(x, w.sm90());
  if (as_hopper())
    refuse_as_hopper(x, concat("wo_a of weights [", w.out(), ", ", w.in(), "] ", held_as(w)));
  if (serves_panels(x)) {
    if (const auto panels = w.kernel_panels()) return group_linear(x, *panels);
  }
  if (!sm90) return group_linear(x, w.values());
  warn_made_dense();
  check_shape(x, {-1, w.matrices(), w.in()}, "group_linear: x");
  std::vector<at::Tensor> parts;
  for (int64_t group = 0; group < w.matrices(); ++group)
    parts.push_back(linear(x.select(1, group), w.values(group), GemmRole::kBf16));
  return at::stack(parts, 1);
}

}  // namespace hadal::ops
