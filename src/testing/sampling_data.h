// Rows of logits with everything that can bear on a draw, the same on every machine: for the tests
// of the sampler on a card and of its twin. Free of ATen.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "ops/sampling/sample_sm90.h"
#include "testing/float_data.h"

namespace hadal::testing {

struct SamplingWorld {
  int64_t vocab, num_rows, stride, mask_words;
  std::vector<float> logits;
  std::vector<ops::SamplingRowSm90> rows;
  std::vector<ops::LogitChangeSm90> changes;
  std::vector<uint32_t> masks;
  std::vector<int32_t> avoided = {0};  // never empty memory

  SamplingWorld(int64_t tokens, int64_t count, unsigned seed)
      : vocab(tokens),
        num_rows(count),
        stride((tokens + 7) / 4 * 4),
        mask_words((tokens + 31) / 32) {
    std::mt19937 random(seed);
    const auto any = [&](auto... values) {
      const double all[] = {static_cast<double>(values)...};
      return all[random() % sizeof...(values)];
    };
    for (int64_t r = 0; r < num_rows; ++r) {
      auto row = normals(static_cast<size_t>(stride), static_cast<float>(any(0.01, 1, 3, 6)),
                         static_cast<unsigned>(random()));
      if (r % 3 == 0) {  // ties
        for (float& v : row) v = std::round(v * 4.0f) / 4.0f;
      }
      for (int i = 0; i < 5; ++i) row[random() % row.size()] = i == 0 ? NAN : -INFINITY;
      logits.insert(logits.end(), row.begin(), row.end());
      ops::SamplingRowSm90 s;
      s.temperature = any(0, 0.2, 0.7, 1, 1, 1.5, 30);
      const double min_p = any(0, 0, 0, 0.02, 0.5);
      s.least = min_p > 0.0 ? std::log(min_p) : -INFINITY;
      s.top_p = any(1, 1, 0.95, 0.5, 0.01);
      s.top_k = static_cast<int32_t>(any(0, 0, 1, 2, 20, 1000));
      s.seed = random();
      s.stream = (uint64_t{random()} << 32) | random();
      s.choice = static_cast<uint32_t>(random() % 3);
      s.changes = static_cast<int32_t>(changes.size());
      if (r % 2 == 1) {
        s.repetition_penalty = any(1, 1.3);
        s.presence_penalty = any(0, 0.5);
        s.frequency_penalty = any(0, 0.25);
        for (int64_t t = static_cast<int64_t>(random() % 5); t < vocab;
             t += 1 + static_cast<int64_t>(random() % 60))
          changes.push_back({static_cast<int32_t>(t), static_cast<int32_t>(random() % 4) - 1,
                             random() % 2 == 0 ? -0.0 : any(-3.5, 0.1, 5)});
        s.num_changes = static_cast<int32_t>(changes.size()) - s.changes;
      }
      if (r % 5 == 4) {
        s.mask = static_cast<int32_t>(static_cast<int64_t>(masks.size()) / mask_words);
        for (int64_t w = 0; w < mask_words; ++w)
          masks.push_back(r % 2 == 0 ? static_cast<uint32_t>(random()) : (random() % 64 == 0) * 4u);
      }
      if (r % 4 == 3) {  // of rows with few tokens allowed: all that are
        s.avoided = static_cast<int32_t>(avoided.size());
        for (int64_t t = 0; t < vocab && s.num_avoided < 512; ++t) {
          const bool few = s.mask >= 0 && r % 2 == 1;
          const uint32_t word = few ? masks[static_cast<size_t>(s.mask * mask_words + t / 32)] : 0;
          if (few ? (word >> t % 32 & 1) == 0 : random() % 16 != 0) continue;
          avoided.push_back(static_cast<int32_t>(t));
          ++s.num_avoided;
        }
      }
      rows.push_back(s);
    }
  }

  ops::SampleSm90Params params(int32_t* tokens) const {
    return {logits.data(), rows.data(), changes.data(), masks.data(), avoided.data(),
            tokens,        num_rows,    vocab,          stride,       mask_words};
  }
};

}  // namespace hadal::testing
