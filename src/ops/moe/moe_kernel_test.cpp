// Routed experts on a card from the choice to the sum, against the twin, bit for bit.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "ops/gemm/hopper_twin.h"
#include "ops/gemm/sm90_pack.h"
#include "ops/moe/moe_cpu.h"
#include "ops/moe/moe_sm90.h"
#include "ops/quant/round_trip_cpu.h"
#include "testing/on_device.h"
#include "testing/product_data.h"

namespace hadal::ops {

// In the program these stand beside the ops, which need LibTorch.
constinit CpuSlot<void(const SwigluCpuParams&, int64_t, int64_t)> swiglu_cpu;
constinit CpuSlot<void(const CombineCpuParams&, int64_t, int64_t)> combine_cpu;
constinit CpuSlot<void(const RoundTripCpuParams&, int64_t, int64_t)> fp8_round_trip_cpu;
constinit CpuSlot<void(const RoundTripCpuParams&, int64_t, int64_t)> fp4_round_trip_cpu;
constinit CpuSlot<void(const HadamardCpuParams&, int64_t, int64_t)> hadamard_cpu;

namespace {

using testing::OnDevice;

constexpr int64_t kTopk = 3, kExperts = 9, kDim = 256, kInter = 128;
constexpr float kLimit = 1.5f;

/// FP4 weights of all experts: packed as stored, as tiles, and folded.
struct Weights {
  int64_t outputs, in;
  std::vector<uint8_t> tiles, codes;
  std::vector<float> scales;

  Weights(int64_t num_outputs, int64_t inputs, unsigned seed) : outputs(num_outputs), in(inputs) {
    std::mt19937 random(seed);
    const int64_t all = kExperts * outputs;
    std::vector<uint8_t> packed(static_cast<size_t>(all * in / 2)),
        e8m0(static_cast<size_t>(all * in / 32));
    for (uint8_t& byte : packed) byte = static_cast<uint8_t>(random());
    for (uint8_t& byte : e8m0) byte = static_cast<uint8_t>(118 + random() % 4);
    tiles.resize(static_cast<size_t>(kExperts * sm90::fp4_bytes(outputs, in)));
    codes.resize(static_cast<size_t>(all * in));
    scales.resize(static_cast<size_t>(all * (in / 128)));
    for (int64_t e = 0; e < kExperts; ++e) {
      EXPECT_EQ(
          sm90::pack_fp4(packed.data() + e * outputs * in / 2, e8m0.data() + e * outputs * in / 32,
                         outputs, in, tiles.data() + e * sm90::fp4_bytes(outputs, in)),
          0);
    }
    for (int64_t o = 0; o < all; ++o) {
      EXPECT_TRUE(fold_fp4(packed.data() + o * in / 2, e8m0.data() + o * in / 32, in,
                           codes.data() + o * in, scales.data() + o * (in / 128)));
    }
  }

  /// BF16 results of one row that went through Q8_128.
  std::vector<uint16_t> product(int64_t expert,
                                const std::vector<uint8_t>& x,
                                const std::vector<float>& x_scale) const {
    std::vector<float> y(static_cast<size_t>(outputs));
    twin_fp8_cpu({codes.data() + expert * outputs * in,
                  scales.data() + expert * outputs * (in / 128), x.data(), x_scale.data(), y.data(),
                  outputs, 1, in});
    std::vector<uint16_t> rounded;
    for (const float v : y) {
      const auto bits = std::bit_cast<uint32_t>(v);
      rounded.push_back(static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
    }
    return rounded;
  }
};

float widen(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

/// Q8_128 of a BF16 row as codes and scales: the CPU's round trip, divided by the power of two that
/// model.md 14.2 gives.
void quantise(const uint16_t* x,
              int64_t in,
              std::vector<uint8_t>& codes,
              std::vector<float>& scales) {
  std::vector<uint16_t> rounded(static_cast<size_t>(in));
  fp8_round_trip_cpu({.x = x,
                      .out = rounded.data(),
                      .stride = in,
                      .dim = in,
                      .group = 128,
                      .dtype = ElementType::kBf16},
                     0, 1);
  codes.clear();
  scales.clear();
  for (int64_t first = 0; first < in; first += 128) {
    float largest = 1e-4f;
    for (int64_t i = first; i < first + 128; ++i)
      largest = std::max(largest, std::fabs(widen(x[i])));
    int exponent = 0;
    const float fraction = std::frexp(largest * (1.0f / 448.0f), &exponent);
    const float scale = std::ldexp(1.0f, fraction == 0.5f ? exponent - 1 : exponent);
    scales.push_back(scale);
    for (int64_t i = first; i < first + 128; ++i) {
      const float value = widen(rounded[i]) / scale;
      const float magnitude = std::fabs(value);
      int e = 0;
      std::frexp(magnitude, &e);
      const int field = std::max(e - 1 + 7, 0);
      const auto code =
          magnitude < std::ldexp(1.0f, -6)
              ? static_cast<int>(std::ldexp(magnitude, 9))
              : field << 3 | (static_cast<int>(std::ldexp(magnitude, 3 - (e - 1))) & 7);
      codes.push_back(static_cast<uint8_t>(code | (std::signbit(value) ? 0x80 : 0)));
    }
  }
}

class MoeSm90 : public ::testing::TestWithParam<int64_t> {};

TEST_P(MoeSm90, IsTheTwinsFromTheChoiceToTheSum) {
  const int64_t tokens = GetParam();
  const Weights up(2 * kInter, kDim, 1), down(kDim, kInter, 2);
  std::mt19937 random(3);
  std::vector<int32_t> experts;
  std::vector<float> weights;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<int32_t> order = {0, 1, 2, 3, 4, 5, 6, 8};  // nobody chooses expert 7
    std::shuffle(order.begin(), order.end(), random);
    std::sort(order.begin(), order.begin() + kTopk);
    experts.insert(experts.end(), order.begin(), order.begin() + kTopk);
    for (int64_t k = 0; k < kTopk; ++k)
      weights.push_back(0.25f + static_cast<float>(random() % 256) / 256.0f);
  }
  const auto x = testing::random_bf16(static_cast<size_t>(tokens * kDim), testing::Data::kWide, 4);
  const auto shared =
      testing::random_bf16(static_cast<size_t>(tokens * kDim), testing::Data::kPositive, 5);

  // The twin, a choice at a time.
  std::vector<uint16_t> expected(static_cast<size_t>(tokens * kDim)), rows;
  std::vector<int64_t> place;
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  for (int64_t i = 0; i < tokens * kTopk; ++i) {
    quantise(x.data() + i / kTopk * kDim, kDim, codes, scales);
    const auto gate_up = up.product(experts[i], codes, scales);
    std::vector<uint16_t> h(static_cast<size_t>(kInter));
    swiglu_cpu({.gate = gate_up.data(),
                .up = gate_up.data() + kInter,
                .weight = &weights[i],
                .out = h.data(),
                .inter = kInter,
                .limit = kLimit,
                .dtype = ElementType::kBf16},
               0, 1);
    quantise(h.data(), kInter, codes, scales);
    const auto y = down.product(experts[i], codes, scales);
    place.push_back(i);
    rows.insert(rows.end(), y.begin(), y.end());
  }
  combine_cpu({.rows = rows.data(),
               .place = place.data(),
               .shared = shared.data(),
               .out = expected.data(),
               .topk = kTopk,
               .dim = kDim,
               .dtype = ElementType::kBf16},
              0, tokens);

  const int64_t capacity = max_routed_rows(tokens, kTopk, kExperts), groups = capacity / 8;
  const int64_t max_runs = std::min(kExperts, tokens * kTopk);
  const auto bytes = [](int64_t n) { return static_cast<size_t>(n); };
  const OnDevice<int32_t> experts_there(experts), source(bytes(capacity)),
      there_place(experts.size()), num_runs(1);
  const OnDevice<float> weights_there(weights), row_weight(bytes(capacity)),
      x_scale(bytes(capacity * kDim / 128)), h_scale(bytes(capacity * kInter / 128));
  const OnDevice<ExpertRun> runs(bytes(max_runs));
  const OnDevice<uint16_t> x_there(x), shared_there(shared), gate_up(bytes(capacity * 2 * kInter)),
      y(bytes(capacity * kDim)), out(expected.size());
  const OnDevice<uint8_t> x_codes(bytes(capacity * kDim)), h_codes(bytes(capacity * kInter)),
      up_there(up.tiles), down_there(down.tiles);
  route_sm90({experts_there.get(), weights_there.get(), source.get(), row_weight.get(),
              there_place.get(), runs.get(), num_runs.get(), tokens, kTopk, kExperts, capacity},
             nullptr);
  quantise_operand_sm90(
      {x_there.get(), source.get(), capacity, kDim, kDim, x_codes.get(), x_scale.get(), groups},
      nullptr);
  experts_fp4_sm90({x_codes.get(),
                    x_scale.get(),
                    groups,
                    up_there.get(),
                    2 * kInter,
                    kDim / 128,
                    runs.get(),
                    num_runs.get(),
                    max_runs,
                    {gate_up.get(), 2 * kInter, ElementType::kBf16}},
                   nullptr);
  swiglu_quantise_sm90({gate_up.get(), row_weight.get(), source.get(), kLimit, capacity, kInter,
                        h_codes.get(), h_scale.get(), groups},
                       nullptr);
  experts_fp4_sm90({h_codes.get(),
                    h_scale.get(),
                    groups,
                    down_there.get(),
                    kDim,
                    kInter / 128,
                    runs.get(),
                    num_runs.get(),
                    max_runs,
                    {y.get(), kDim, ElementType::kBf16}},
                   nullptr);
  combine_sm90({y.get(), there_place.get(), shared_there.get(), out.get(), tokens, kTopk, kDim},
               nullptr);
  const std::vector<uint16_t> found = out.read();
  int64_t wrong = 0;
  for (size_t i = 0; i < found.size(); ++i) wrong += found[i] != expected[i];
  EXPECT_EQ(wrong, 0) << "of " << found.size();
}

// One block, and several that count first, against the twin.
TEST(RouteSm90, EveryRowHasThePlaceOfTheTwin) {
  constexpr int64_t kTopk = 6;
  std::mt19937 random(3);
  for (const int64_t num_experts : {9, 256, 1000}) {
    for (const int64_t tokens : {1, 300, 4096}) {
      std::vector<int32_t> experts;
      std::vector<float> weights;
      for (int64_t t = 0; t < tokens; ++t) {
        std::set<int32_t> chosen;
        while (std::ssize(chosen) < kTopk)
          chosen.insert(static_cast<int32_t>(random() % static_cast<uint64_t>(num_experts)));
        experts.insert(experts.end(), chosen.begin(), chosen.end());
        for (int64_t k = 0; k < kTopk; ++k)
          weights.push_back(static_cast<float>(random() % 1000) / 1000.0f);
      }
      const int64_t rows = max_routed_rows(tokens, kTopk, num_experts);
      const auto size = static_cast<size_t>(rows);
      const auto max_runs = static_cast<size_t>(std::min(num_experts, tokens * kTopk));
      struct Found {
        std::vector<int32_t> source, place;
        std::vector<float> weight;
        std::vector<ExpertRun> runs;
        int32_t num_runs = 0;
      };
      Found wanted{std::vector<int32_t>(size), std::vector<int32_t>(experts.size()),
                   std::vector<float>(size), std::vector<ExpertRun>(max_runs)};
      route_twin({experts.data(), weights.data(), wanted.source.data(), wanted.weight.data(),
                  wanted.place.data(), wanted.runs.data(), &wanted.num_runs, tokens, kTopk,
                  num_experts, rows});
      const OnDevice<int32_t> experts_there(experts), source(size), place(experts.size()),
          num_runs(1), counts(static_cast<size_t>(num_experts));
      const OnDevice<float> weights_there(weights), weight(size);
      const OnDevice<ExpertRun> runs(max_runs);
      for (const bool many : {false, true}) {
        route_sm90({experts_there.get(), weights_there.get(), source.get(), weight.get(),
                    place.get(), runs.get(), num_runs.get(), tokens, kTopk, num_experts, rows,
                    many ? counts.get() : nullptr},
                   nullptr);
        EXPECT_EQ(source.read(), wanted.source) << num_experts << " " << tokens << " " << many;
        EXPECT_EQ(weight.read(), wanted.weight) << num_experts << " " << tokens << " " << many;
        EXPECT_EQ(place.read(), wanted.place) << num_experts << " " << tokens << " " << many;
        ASSERT_EQ(num_runs.read()[0], wanted.num_runs);
        const auto found = runs.read();
        for (int32_t i = 0; i < wanted.num_runs; ++i) {
          const auto at = static_cast<size_t>(i);
          EXPECT_EQ(found[at].expert, wanted.runs[at].expert);
          EXPECT_EQ(found[at].first_row, wanted.runs[at].first_row);
          EXPECT_EQ(found[at].rows, wanted.runs[at].rows);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tokens, MoeSm90, ::testing::Values(1, 7, 64, 300));

// What gate_sm90 and route_sm90 do, in one kernel of one block.
TEST(GateRouteSm90, ChoosesAndPlacesAsTheTwin) {
  constexpr int64_t kTopk = 6, kIds = 40;
  std::mt19937 random(5);
  const auto bytes = [](int64_t n) { return static_cast<size_t>(n); };
  for (const int64_t num_experts : {9, 256, 384, 1000}) {
    for (const int64_t tokens : {1, 2, 6, 16}) {
      if (!serves_gate_route_sm90(tokens, num_experts, kTopk)) continue;
      std::vector<float> logits(bytes(tokens * num_experts)), bias(bytes(num_experts));
      for (float& v : logits)
        v = static_cast<float>(static_cast<int>(random() % 4000) - 2000) / 200;
      for (float& v : bias) v = static_cast<float>(random() % 100) / 400;
      std::vector<int64_t> table, ids, all(bytes(num_experts));
      std::iota(all.begin(), all.end(), 0);
      for (int64_t id = 0; id < kIds; ++id) {
        std::shuffle(all.begin(), all.end(), random);
        table.insert(table.end(), all.begin(), all.begin() + kTopk);
      }
      for (int64_t t = 0; t < tokens; ++t) ids.push_back(static_cast<int64_t>(random() % kIds));
      const int64_t rows = max_routed_rows(tokens, kTopk, num_experts),
                    max_runs = std::min(num_experts, tokens * kTopk);
      const OnDevice<float> logits_there(logits), bias_there(bias);
      const OnDevice<int64_t> table_there(table), ids_there(ids);
      for (const char* kind : {"bias", "table", "rows of the table"}) {
        const bool biased = kind[0] == 'b', by_id = kind[0] == 't';
        std::vector<int32_t> experts(bytes(tokens * kTopk)), source(bytes(rows)),
            place(bytes(tokens * kTopk));
        std::vector<float> weights(bytes(tokens * kTopk)), row_weight(bytes(rows));
        std::vector<ExpertRun> runs(bytes(max_runs));
        int32_t num_runs = 0;
        gate_route_twin(
            {.gate = {logits.data(), biased ? bias.data() : nullptr, table.data(),
                      by_id ? ids.data() : nullptr, experts.data(), weights.data(), tokens,
                      num_experts, kTopk, 1.5f},
             .route = {experts.data(), weights.data(), source.data(), row_weight.data(),
                       place.data(), runs.data(), &num_runs, tokens, kTopk, num_experts, rows}});
        const OnDevice<int32_t> experts_there(experts.size()), source_there(source.size()),
            place_there(place.size()), num_runs_there(1);
        const OnDevice<float> weights_there(weights.size()), row_weight_there(row_weight.size());
        const OnDevice<ExpertRun> runs_there(runs.size());
        gate_route_sm90(
            {.gate = {logits_there.get(), biased ? bias_there.get() : nullptr, table_there.get(),
                      by_id ? ids_there.get() : nullptr, experts_there.get(), weights_there.get(),
                      tokens, num_experts, kTopk, 1.5f},
             .route = {experts_there.get(), weights_there.get(), source_there.get(),
                       row_weight_there.get(), place_there.get(), runs_there.get(),
                       num_runs_there.get(), tokens, kTopk, num_experts, rows}},
            nullptr);
        const std::string what =
            std::to_string(num_experts) + " " + std::to_string(tokens) + " " + kind;
        EXPECT_EQ(experts_there.read(), experts) << what;
        EXPECT_EQ(weights_there.read(), weights) << what;
        EXPECT_EQ(source_there.read(), source) << what;
        EXPECT_EQ(row_weight_there.read(), row_weight) << what;
        EXPECT_EQ(place_there.read(), place) << what;
        ASSERT_EQ(num_runs_there.read()[0], num_runs) << what;
        const std::vector<ExpertRun> found = runs_there.read();
        for (size_t i = 0; i < bytes(num_runs); ++i) {
          EXPECT_EQ(found[i].expert, runs[i].expert) << what;
          EXPECT_EQ(found[i].first_row, runs[i].first_row) << what;
          EXPECT_EQ(found[i].rows, runs[i].rows) << what;
        }
      }
    }
  }
}

}  // namespace
}  // namespace hadal::ops
