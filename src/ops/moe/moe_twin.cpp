#include <algorithm>
#include <vector>

#include "base/parallel.h"
#include "ops/gemm/operand_twin.h"
#include "ops/gemm/sm90_layout.h"
#include "ops/moe/moe_cpu.h"
#include "ops/moe/moe_sm90.h"

namespace hadal::ops {

void route_twin(const RouteSm90Params& p) {
  std::fill(p.source, p.source + p.rows, -1);
  std::fill(p.row_weight, p.row_weight + p.rows, 0.0f);
  std::vector<std::vector<int64_t>> choices(static_cast<size_t>(p.num_experts));
  for (int64_t choice = 0; choice < p.tokens * p.topk; ++choice)
    choices[static_cast<size_t>(p.experts[choice])].push_back(choice);
  int32_t first_row = 0, num_runs = 0;
  for (size_t expert = 0; expert < choices.size(); ++expert) {
    const auto count = static_cast<int32_t>(choices[expert].size());
    if (count == 0) continue;
    p.runs[num_runs++] = {static_cast<int32_t>(expert), first_row, count};
    int32_t row = first_row;
    for (const int64_t choice : choices[expert]) {
      p.source[row] = static_cast<int32_t>(choice / p.topk);
      p.row_weight[row] = p.weights[choice];
      p.place[choice] = row++;
    }
    first_row += static_cast<int32_t>(sm90::round_up(count, sm90::kGroupRows));
  }
  *p.num_runs = num_runs;
}

void gate_route_twin(const GateRouteSm90Params& p) {
  gate_twin(p.gate);
  route_twin(p.route);
}

void swiglu_twin(const SwigluSm90Params& p) {
  const SwigluCpuParams params{.gate = p.gate,
                               .up = p.up,
                               .weight = p.weight,
                               .out = p.out,
                               .inter = p.inter,
                               .limit = p.limit,
                               .dtype = ElementType::kBf16};
  parallel_for(p.rows, 4, [&](int64_t begin, int64_t end) { swiglu_cpu(params, begin, end); });
}

void swiglu_quantise_twin(const SwigluQuantiseSm90Params& p) {
  const auto* gate_up = static_cast<const uint16_t*>(p.gate_up);
  parallel_for(p.x_groups * sm90::kGroupRows, 4, [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> hidden(static_cast<size_t>(p.inter));
    for (int64_t row = begin; row < end; ++row) {
      const uint16_t* gate = gate_up + row * 2 * p.inter;
      const bool exists = row < p.rows && (p.source == nullptr || p.source[row] >= 0);
      if (exists) {
        swiglu_cpu({.gate = gate,
                    .up = gate + p.inter,
                    .weight = p.weight != nullptr ? p.weight + row : nullptr,
                    .out = hidden.data(),
                    .inter = p.inter,
                    .limit = p.limit,
                    .dtype = ElementType::kBf16},
                   0, 1);
      }
      quantise_row_twin(exists ? hidden.data() : nullptr, p.inter, row, p.codes, p.scales,
                        p.x_groups);
    }
  });
}

void combine_twin(const CombineSm90Params& p) {
  const std::vector<int64_t> place(p.place, p.place + p.tokens * p.topk);
  const CombineCpuParams params{.rows = p.rows,
                                .place = place.data(),
                                .shared = p.shared,
                                .out = p.out,
                                .topk = p.topk,
                                .dim = p.dim,
                                .dtype = ElementType::kBf16};
  parallel_for(p.tokens, 8, [&](int64_t begin, int64_t end) { combine_cpu(params, begin, end); });
}

}  // namespace hadal::ops
