#include "model/init.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/hash.h"
#include "base/philox.h"

namespace hadal::model {
namespace {

/// Standard normal values that depend on the key alone (Box-Muller on pairs of uniform draws).
void fill_normal(double* out, int64_t count, double std, uint64_t seed, uint64_t stream) {
  const Philox random(seed, stream);
  for (int64_t i = 0; i < count; i += 4) {
    const auto words = random.block(static_cast<uint64_t>(i / 4));
    for (int pair = 0; pair < 2; ++pair) {
      // (0, 1]: the logarithm needs a positive number.
      const double u = (static_cast<double>(words[2 * pair]) + 1.0) * 0x1p-32;
      const double angle =
          2.0 * std::numbers::pi * static_cast<double>(words[2 * pair + 1]) * 0x1p-32;
      const double radius = std * std::sqrt(-2.0 * std::log(u));
      if (i + 2 * pair < count) out[i + 2 * pair] = radius * std::cos(angle);
      if (i + 2 * pair + 1 < count) out[i + 2 * pair + 1] = radius * std::sin(angle);
    }
  }
}

at::Tensor normal(const Parameter& parameter, const InitParams& params) {
  at::Tensor values = at::empty(parameter.shape, at::kDouble);
  fill_normal(values.data_ptr<double>(), values.numel(), params.std, params.seed,
              fnv1a64(parameter.name));
  return values;
}

/// Static biases of mHC: collapse weights of 1/n each, expand weights of 1, combination near the
/// identity, so that the streams start as a plain residual (model.md 17.8).
at::Tensor hc_base(int64_t rows, int64_t streams) {
  constexpr double kDiagonal = 4.0;  // softmax([4, 0, 0, 0]) keeps 95 % of a stream in place
  at::Tensor base = at::zeros({rows}, at::kDouble);
  auto* value = base.data_ptr<double>();
  const auto n = static_cast<double>(streams);
  for (int64_t j = 0; j < streams; ++j) value[j] = -std::log(n - 1.0 > 0.0 ? n - 1.0 : 1.0);
  if (rows == streams) return base;  // the collapse before the head has nothing else
  for (int64_t j = 0; j < streams; ++j) value[2 * streams + j * streams + j] = kDiagonal;
  return base;
}

}  // namespace

at::Tensor balanced_hash_table(int64_t vocab,
                               int64_t experts,
                               int64_t topk,
                               uint64_t seed,
                               const std::vector<int64_t>& token_counts) {
  HADAL_CHECK(token_counts.empty() || static_cast<int64_t>(token_counts.size()) == vocab,
              "hash table: ", token_counts.size(), " counts for a vocabulary of ", vocab);
  HADAL_CHECK(topk <= experts, "hash table: top ", topk, " of ", experts);
  std::vector<int64_t> order(static_cast<size_t>(vocab));
  std::iota(order.begin(), order.end(), 0);
  const auto count = [&](int64_t id) {
    return token_counts.empty() ? int64_t{1} : token_counts[static_cast<size_t>(id)];
  };
  // Frequent ids choose first, each the least loaded experts; random keys break ties, so that equal
  // loads do not send neighbouring ids to neighbouring experts.
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return count(a) > count(b); });
  const Philox random(seed, fnv1a64("hash table"));
  std::vector<int64_t> load(static_cast<size_t>(experts), 0);
  at::Tensor table = at::empty({vocab, topk}, at::kLong);
  auto* out = table.data_ptr<int64_t>();
  std::vector<std::pair<int64_t, uint32_t>> key(static_cast<size_t>(experts));
  std::vector<int64_t> candidates(static_cast<size_t>(experts));
  for (const int64_t id : order) {
    for (int64_t e = 0; e < experts; ++e) {
      const auto words = random.block(static_cast<uint64_t>(id * ((experts + 3) / 4) + e / 4));
      key[static_cast<size_t>(e)] = {load[static_cast<size_t>(e)],
                                     words[static_cast<size_t>(e % 4)]};
      candidates[static_cast<size_t>(e)] = e;
    }
    std::partial_sort(candidates.begin(), candidates.begin() + topk, candidates.end(),
                      [&](int64_t a, int64_t b) {
                        return key[static_cast<size_t>(a)] < key[static_cast<size_t>(b)];
                      });
    std::sort(candidates.begin(), candidates.begin() + topk);
    for (int64_t k = 0; k < topk; ++k) {
      const int64_t expert = candidates[static_cast<size_t>(k)];
      out[id * topk + k] = expert;
      load[static_cast<size_t>(expert)] += count(id) + 1;
    }
  }
  return table;
}

namespace {

at::Tensor initial_value(const Parameter& parameter,
                         const ModelConfig& config,
                         const InitParams& params,
                         at::ScalarType dtype) {
  switch (parameter.kind) {
    case ParamKind::kHashTable:
      return balanced_hash_table(config.vocab_size, config.n_routed_experts,
                                 config.n_activated_experts, params.seed ^ fnv1a64(parameter.name),
                                 params.token_counts);
    case ParamKind::kNorm:
      return at::ones(parameter.shape, dtype);
    case ParamKind::kSink:
    case ParamKind::kApe:
    case ParamKind::kGateBias:
      return at::zeros(parameter.shape, dtype);
    case ParamKind::kHcScale:
      return at::full(parameter.shape, 0.01, dtype);
    case ParamKind::kHcBase:
      return hc_base(parameter.shape[0], config.hc_mult).to(dtype);
    case ParamKind::kMatrix:
    case ParamKind::kGroups:
    case ParamKind::kExperts:
    case ParamKind::kEmbedding:
    case ParamKind::kHead:
    case ParamKind::kHcFn:
      break;
  }
  return normal(parameter, params).to(dtype);
}

}  // namespace

void init_weights(Transformer& model, const InitParams& params, at::ScalarType dtype) {
  model.visit([&](Parameter& parameter) {
    if (parameter.elsewhere) return;
    const at::Tensor whole = initial_value(parameter, model.config(), params, dtype);
    parameter.hold(parameter.shard.whole() ? whole : parameter.shard.of(whole).clone());
  });
}

void require_gradients(Transformer& model) {
  model.visit([](Parameter& parameter) {
    parameter.hold_dense();
    // Held anew: panels of values that will move are of no use.
    if (parameter.trainable() && !parameter.elsewhere)
      parameter.hold(parameter.value.requires_grad_(true));
  });
}

void move_to(Transformer& model, at::Device device) {
  model.visit([&](Parameter& parameter) {
    if (parameter.elsewhere) return;
    if (parameter.weight.defined())
      return parameter.hold(parameter.weight.to(device, parameter.role));
    const bool requires_grad = parameter.value.requires_grad();
    parameter.hold(parameter.value.detach().to(device).requires_grad_(requires_grad));
  });
}

void shard_experts(Transformer& model, int64_t part, int64_t parts) {
  model.visit([&](Parameter& parameter) {
    if (parameter.kind != ParamKind::kExperts) return;
    HADAL_CHECK(!parameter.value.defined() && !parameter.weight.defined(),
                "shard_experts: ", parameter.name, " has values already");
    parameter.shard = Shard::even(0, parameter.shape[0], part, parts);
  });
}

}  // namespace hadal::model
