#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "ops/exact_math.h"
#include "ops/moe/gate_sm90.h"

namespace hadal::ops {

void gate_twin(const GateSm90Params& p) {
  const auto experts = static_cast<size_t>(p.num_experts);
  std::vector<float> affinity(experts), score(experts);
  std::vector<int32_t> order(experts);
  for (int64_t token = 0; token < p.tokens; ++token) {
    for (size_t e = 0; e < experts; ++e) {
      const float logit = p.logits[static_cast<size_t>(token) * experts + e];
      affinity[e] = std::sqrt(static_cast<float>(softplus64(logit)));
      if (p.affinity != nullptr) p.affinity[static_cast<size_t>(token) * experts + e] = affinity[e];
      if (p.bias == nullptr) continue;
      const float biased = affinity[e] + p.bias[e];
      score[e] = std::isnan(biased) ? -INFINITY : biased;
    }
    int32_t* chosen = p.experts + token * p.topk;
    if (p.bias != nullptr) {
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(
          order.begin(), order.begin() + p.topk, order.end(), [&](int32_t a, int32_t b) {
            const float x = score[static_cast<size_t>(a)], y = score[static_cast<size_t>(b)];
            return x > y || (x == y && a < b);
          });
      std::copy_n(order.begin(), p.topk, chosen);
    } else {
      const int64_t row = p.ids != nullptr ? p.ids[token] : token;
      for (int64_t k = 0; k < p.topk; ++k)
        chosen[k] = static_cast<int32_t>(p.table[row * p.topk + k]);
    }
    std::sort(chosen, chosen + p.topk);
    float sum = 0.0f;
    for (int64_t k = 0; k < p.topk; ++k) sum += affinity[static_cast<size_t>(chosen[k])];
    for (int64_t k = 0; k < p.topk; ++k)
      p.weights[token * p.topk + k] = affinity[static_cast<size_t>(chosen[k])] / sum * p.scale;
  }
}

}  // namespace hadal::ops
