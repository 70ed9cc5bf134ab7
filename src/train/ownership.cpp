#include "train/ownership.h"

#include <algorithm>
#include <numeric>

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
    const int64_t bytes = static_cast<int64_t>(parameter.value.nbytes());
    sizes.push_back(rule == UpdateRule::kMuon ? bytes : 2 * bytes);
  });
  std::vector<int64_t> loads;
  owners_ = fill_buckets(sizes, ranks, loads);
  load_ = {.most = *std::max_element(loads.begin(), loads.end()),
           .total = std::accumulate(loads.begin(), loads.end(), int64_t{0})};
}

}  // namespace hadal::train
