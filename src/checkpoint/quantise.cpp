#include "checkpoint/quantise.h"

#include <ATen/ATen.h>

#include "base/check.h"

namespace hadal::checkpoint {
namespace {

at::Tensor checked(const at::Tensor& w, const std::string& name) {
  HADAL_CHECK(w.dim() == 2, "quantise: ", name, " has shape ", w.sizes());
  const at::Tensor values = w.detach().cpu().to(at::kFloat).contiguous();
  HADAL_INPUT_CHECK(at::isfinite(values).all().item<bool>(), name,
                    ": holds values that are not finite, which no FP8 or FP4 code stands for");
  return values;
}

}  // namespace

ops::StoredCodes quantise_fp8(const at::Tensor& w, const std::string& name) {
  return ops::official_codes(checked(w, name), ops::OfficialStorage::kFp8);
}

ops::StoredCodes quantise_fp4(const at::Tensor& w, const std::string& name) {
  const at::Tensor values = checked(w, name);
  HADAL_CHECK(values.size(1) % 32 == 0, "quantise: ", name, " has ", values.size(1),
              " inputs, expected a multiple of 32");
  return ops::official_codes(values, ops::OfficialStorage::kFp4);
}

}  // namespace hadal::checkpoint
