#include <algorithm>
#include <bit>

#include "ops/gemm/hopper_twin.h"
#include "ops/indexer/index_bf16_sm90.h"

namespace hadal::ops {

float index_score_bf16_twin(const uint16_t* q,
                            const uint16_t* w,
                            const uint16_t* key,
                            int64_t heads) {
  float lanes[4] = {};
  for (int64_t head = 0; head < heads; ++head) {
    float dot = 0.0f;
    for (int64_t k = 0; k < kIndexDim; k += 16)
      dot = wgmma_bf16(key + k, q + head * kIndexDim + k, dot);
    const float weight = std::bit_cast<float>(static_cast<uint32_t>(w[head]) << 16);
    const float term = std::max(dot, 0.0f) * weight;
    float& lane = lanes[head % 8 / 2];
    lane = lane + term;
  }
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

}  // namespace hadal::ops
