// Rows with random settings, histories, masks and avoided tokens, the same on every machine: for
// tests of who draws from them.
#pragma once

#include <cmath>
#include <cstdint>
#include <deque>
#include <random>
#include <vector>

#include "ops/sampling/sample.h"
#include "ops/sampling/sm90_draws.h"
#include "testing/float_data.h"

namespace hadal::testing {

struct DrawWorld {
  struct One {
    Sampling sampling;
    ops::TokenHistory history;
    std::vector<int64_t> ahead, avoided;
    std::vector<uint32_t> mask;
    int64_t row = 0, position = 0, choice = 0, top_logprobs = -1;

    ops::Adjustment adjustment() const {
      return {.sampling = sampling,
              .history = &history,
              .ahead = ahead,
              .mask = mask,
              .avoided = avoided};
    }
  };
  int64_t vocab, stride, num_rows;
  std::vector<float> logits;  ///< [num_rows, stride]
  std::deque<One> draws;      ///< of any rows, in any order

  DrawWorld(int64_t tokens, int64_t rows, int64_t count, unsigned seed)
      : vocab(tokens), stride((tokens + 7) / 4 * 4), num_rows(rows) {
    std::mt19937 random(seed);
    const auto any = [&](auto... values) {
      const double all[] = {static_cast<double>(values)...};
      return all[random() % sizeof...(values)];
    };
    const auto token = [&] {
      return static_cast<int64_t>(random() % static_cast<uint64_t>(vocab));
    };
    for (int64_t r = 0; r < rows; ++r) {
      const auto row = normals(static_cast<size_t>(stride), static_cast<float>(any(0.1, 1, 4)),
                               static_cast<unsigned>(random()));
      logits.insert(logits.end(), row.begin(), row.end());
    }
    for (int64_t i = 0; i < count; ++i) {
      One& d = draws.emplace_back();
      d.row = static_cast<int64_t>(random() % static_cast<uint64_t>(rows));
      d.position = static_cast<int64_t>(random() % 100'000);
      d.choice = static_cast<int64_t>(random() % 3);
      d.top_logprobs = static_cast<int64_t>(any(-1, 0, 5));
      d.sampling = {.temperature = any(0, 0.7, 1, 1, 2),
                    .top_p = any(1, 1, 0.9, 0.3),
                    .seed = random(),
                    .top_k = static_cast<int64_t>(any(0, 0, 3, 50, 1'000'000)),
                    .min_p = any(0, 0, 0.05),
                    .repetition_penalty = any(1, 1, 1.4),
                    .presence_penalty = any(0, 0, 0.5, -0.3),
                    .frequency_penalty = any(0, 0, 0.2)};
      for (int n = static_cast<int>(random() % 4); n > 0; --n) {
        const int64_t biased = token();
        bool there = false;
        for (const auto& [other, bias] : d.sampling.logit_bias) there |= other == biased;
        if (!there) d.sampling.logit_bias.emplace_back(biased, any(-100, -1.5, 2, 100));
      }
      std::vector<int64_t> prompt(random() % 40);
      for (int64_t& t : prompt) t = token();
      d.history.add_prompt(prompt);
      for (size_t n = random() % 40; n > 0; --n) d.history.add(n % 3 == 0 ? token() : token() % 7);
      for (size_t n = random() % 4; n > 0; --n) d.ahead.push_back(token() % 9);
      if (random() % 3 == 0) {
        d.mask.resize(static_cast<size_t>((vocab + 31) / 32 - (random() % 2 == 0 ? 1 : 0)));
        for (uint32_t& word : d.mask)
          word = static_cast<uint32_t>(random()) & static_cast<uint32_t>(random());
        d.mask[0] |= 1;
      }
      for (size_t n = random() % 3; n > 0; --n) d.avoided.push_back(token());
    }
  }

  std::vector<ops::DrawRow> host_rows() const {
    std::vector<ops::DrawRow> rows;
    for (const One& d : draws)
      rows.push_back({.logits = {logits.data() + d.row * stride, static_cast<size_t>(vocab)},
                      .adjustment = d.adjustment(),
                      .position = d.position,
                      .choice = d.choice,
                      .top_logprobs = d.top_logprobs});
    return rows;
  }
  std::vector<ops::DeviceDrawRow> device_rows() const {
    std::vector<ops::DeviceDrawRow> rows;
    for (const One& d : draws)
      rows.push_back({.row = d.row,
                      .adjustment = d.adjustment(),
                      .position = d.position,
                      .choice = d.choice,
                      .top_logprobs = d.top_logprobs});
    return rows;
  }
};

}  // namespace hadal::testing
