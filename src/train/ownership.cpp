#include "train/ownership.h"

#include <algorithm>
#include <map>
#include <numeric>

#include <ATen/ATen.h>

#include "base/check.h"
#include "train/optimizer.h"

namespace hadal::train {

std::vector<int64_t> fill_buckets(const std::vector<int64_t>& sizes,
                                  int64_t ranks,
                                  std::vector<int64_t>& loads) {
  HADAL_CHECK(ranks >= 1, "fill_buckets: ", ranks, " buckets");
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return sizes[a] > sizes[b]; });
  loads.assign(static_cast<size_t>(ranks), 0);
  std::vector<int64_t> buckets(sizes.size(), 0);
  for (const size_t item : order) {
    const auto least = std::min_element(loads.begin(), loads.end());
    *least += sizes[item];
    buckets[item] = least - loads.begin();
  }
  return buckets;
}

Ownership::Ownership(const model::Transformer& model, int64_t ranks, int64_t rank) : rank_(rank) {
  std::vector<int64_t> sizes;
  model.visit([&](const model::Parameter& parameter) {
    const UpdateRule rule = update_rule(parameter);
    if (rule == UpdateRule::kNone) return;
    const auto bytes = static_cast<int64_t>(parameter.value.nbytes());
    sizes.push_back(rule == UpdateRule::kMuon ? bytes : 2 * bytes);
  });
  std::vector<int64_t> loads;
  owners_ = fill_buckets(sizes, ranks, loads);
  load_ = {.most = *std::max_element(loads.begin(), loads.end()),
           .total = std::accumulate(loads.begin(), loads.end(), int64_t{0})};
}

std::vector<std::vector<size_t>> Ownership::bundles(const std::vector<size_t>& indices,
                                                    const std::vector<int64_t>& bytes) const {
  // A message costs as much as some 100 KB of it; larger bundles would only be copied for longer.
  constexpr int64_t kAlone = 128 << 10, kFull = 512 << 10;
  struct Open {
    size_t bundle;
    int64_t bytes;
  };
  std::map<int64_t, Open> open;  // by owner
  std::vector<std::vector<size_t>> result;
  for (const size_t index : indices) {
    const int64_t size = bytes[index];
    const auto found = open.find(owner(index));
    if (size < kAlone && found != open.end() && found->second.bytes + size <= kFull) {
      result[found->second.bundle].push_back(index);
      found->second.bytes += size;
      continue;
    }
    if (size < kAlone) open[owner(index)] = {result.size(), size};
    result.push_back({index});
  }
  return result;
}

at::Tensor bundled(const std::vector<at::Tensor>& tensors) {
  if (tensors.size() == 1) return tensors[0].contiguous();
  std::vector<at::Tensor> flat;
  for (const at::Tensor& tensor : tensors) flat.push_back(tensor.reshape({-1}));
  return at::cat(flat);
}

std::vector<at::Tensor> unbundled(const at::Tensor& bundle, const std::vector<at::Tensor>& like) {
  std::vector<at::Tensor> result;
  int64_t begin = 0;
  for (const at::Tensor& each : like) {
    result.push_back(bundle.reshape({-1}).narrow(0, begin, each.numel()).view(each.sizes()));
    begin += each.numel();
  }
  return result;
}

}  // namespace hadal::train
