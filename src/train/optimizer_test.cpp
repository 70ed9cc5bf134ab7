// model.md 17.1 to 17.3 as properties of Optimizer: which rule moves what, and by how much.
#include "train/optimizer.h"

#include <cmath>
#include <map>
#include <set>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "model/init.h"
#include "ops/optim/newton_schulz.h"
#include "testing/kernel_checks.h"
#include "testing/tiny_model.h"

namespace hadal::train {
namespace {

using model::Parameter;
using model::ParamKind;
using testing::same_bits;

model::Transformer make_model(at::ScalarType type = at::kDouble) {
  model::Transformer model = testing::random_model(testing::tiny_config(), 2, type);
  model::require_gradients(model);
  return model;
}

/// Seeded gradients for all parameters that take one.
void set_gradients(model::Transformer& model, uint64_t seed) {
  at::manual_seed(seed);
  model.visit([](Parameter& p) {
    if (p.trainable()) p.value.mutable_grad() = at::randn_like(p.value.detach());
  });
}

std::map<std::string, at::Tensor> snapshot(const model::Transformer& model) {
  std::map<std::string, at::Tensor> values;
  model.visit([&](const Parameter& p) { values[p.name] = p.value.detach().clone(); });
  return values;
}

TEST(Optimizer, EveryParameterIsAssignedExactlyOnce) {
  model::Transformer model = make_model();
  Optimizer optimizer(model, {});
  std::map<std::string, int> momentum, variance;
  int64_t elements = 0;
  for (const StateTensor& state : optimizer.state()) {
    const size_t cut = state.name.rfind('/');
    const bool first = state.name.substr(cut) == "/momentum";
    ++(first ? momentum : variance)[state.name.substr(0, cut)];
    for (const StateTensor::Part& part : state.parts)
      if (first) elements += part.values.numel();
  }
  int64_t expected = 0;
  model.visit([&](Parameter& p) {
    const bool trained = p.kind != ParamKind::kGateBias && p.kind != ParamKind::kHashTable;
    EXPECT_EQ(momentum[p.name], trained ? 1 : 0) << p.name;
    const bool muon = p.is_matrix() || p.kind == ParamKind::kHcFn;
    EXPECT_EQ(update_rule(p) == UpdateRule::kMuon, muon) << p.name;
    EXPECT_EQ(variance[p.name], trained && !muon ? 1 : 0) << p.name;
    const bool decays = p.kind == ParamKind::kEmbedding || p.kind == ParamKind::kHead;
    EXPECT_EQ(update_rule(p) == UpdateRule::kAdamDecay, decays) << p.name;
    if (trained) expected += p.value.numel();
  });
  EXPECT_EQ(elements, expected);
}

// O = HNS(U) sqrt(max(n, m)) 0.18, W <- W (1 - lr wd) - lr O, U = mu M + G with M = mu M + G.
TEST(Optimizer, MuonIsAlgorithmOneOnEveryUnit) {
  model::Transformer model = make_model();
  Optimizer optimizer(model, {});
  std::map<std::string, at::Tensor> buffers;
  for (const uint64_t step : {1, 2, 3}) {
    const auto before = snapshot(model);
    set_gradients(model, step);
    optimizer.step(0.02);
    model.visit([&](Parameter& p) {
      if (update_rule(p) != UpdateRule::kMuon) return;
      at::Tensor& m = buffers[p.name];
      const at::Tensor g = p.value.grad();
      m = m.defined() ? m * 0.95 + g : g.clone();
      const at::Tensor u = (m * 0.95 + g).reshape({p.units, -1, p.shape.back()}),
                       w = before.at(p.name).reshape(u.sizes()),
                       found = p.value.detach().reshape(u.sizes());
      const double size = static_cast<double>(std::max(u.size(1), u.size(2)));
      for (int64_t unit = 0; unit < p.units; ++unit) {
        const at::Tensor o = ops::newton_schulz(u.narrow(0, unit, 1))[0] * (std::sqrt(size) * 0.18);
        const at::Tensor expected = w[unit] * (1.0 - 0.02 * 0.1) - o * 0.02;
        EXPECT_LT((found[unit] - expected).abs().max().item<double>(), 1e-12) << p.name;
      }
    });
  }
}

// However many matrices are orthogonalised together, each has the bits that it has alone.
TEST(Optimizer, MuonMovesAMatrixAloneAsInAnyBatch) {
  const auto moved = [](const std::string& only) {
    model::Transformer model = make_model(at::kFloat);
    Optimizer optimizer(model, {});
    for (const uint64_t step : {1, 2}) {
      set_gradients(model, step);
      model.visit([&](Parameter& p) {
        if (!only.empty() && p.trainable() && p.name != only) p.value.mutable_grad().reset();
      });
      optimizer.step(0.02);
    }
    return snapshot(model);
  };
  const auto together = moved("");
  for (const char* name : {"layers.1.ffn.experts.*.w1.weight", "layers.2.ffn.experts.*.w2.weight",
                           "layers.1.attn.wq_a.weight", "layers.1.attn.wo_a.weight"}) {
    ASSERT_TRUE(together.contains(name)) << name;
    EXPECT_TRUE(same_bits(together.at(name), moved(name).at(name))) << name;
  }
}

TEST(Optimizer, MuonUpdatesHaveAnRmsOf018) {
  model::Transformer model = make_model();
  Optimizer optimizer(model, {.weight_decay = 0.0});
  const auto before = snapshot(model);
  set_gradients(model, 4);
  optimizer.step(1.0);
  model.visit([&](Parameter& p) {
    if (update_rule(p) != UpdateRule::kMuon) return;
    const at::Tensor update =
        (p.value.detach() - before.at(p.name)).reshape({p.units, -1, p.shape.back()});
    for (int64_t unit = 0; unit < p.units; ++unit) {
      const double rms = update[unit].square().mean().sqrt().item<double>();
      // A square Gaussian matrix has singular values near 0, which ten steps leave below 1.
      const bool square = update.size(1) == update.size(2);
      EXPECT_NEAR(rms, 0.18, square ? 0.18 * 0.03 : 0.18 * 0.01) << p.name;
    }
  });
}

TEST(Optimizer, MuonDoesNotSeeTheScaleOfGradients) {
  model::Transformer a = make_model(), b = make_model();
  Optimizer optimizer_a(a, {}), optimizer_b(b, {});
  set_gradients(a, 5);
  set_gradients(b, 5);
  b.visit([](Parameter& p) {
    if (p.trainable()) p.value.mutable_grad().mul_(1024.0);
  });
  optimizer_a.step(0.01);
  optimizer_b.step(0.01);
  const auto values_a = snapshot(a), values_b = snapshot(b);
  for (const auto& [name, value] : values_a) {
    EXPECT_TRUE(at::allclose(value, values_b.at(name), 1e-9, 1e-12)) << name;
  }
}

TEST(Optimizer, AMatrixWithoutGradientStaysAsItIs) {
  model::Transformer model = make_model();
  Optimizer optimizer(model, {});
  const auto before = snapshot(model);
  set_gradients(model, 6);
  std::set<std::string> still, noisy;
  model.visit([&](Parameter& p) {
    if (update_rule(p) != UpdateRule::kMuon) return;
    if (p.name.find("wkv") != std::string::npos) {
      p.value.mutable_grad().zero_();
      still.insert(p.name);
    } else if (p.name.find("wo_b") != std::string::npos) {
      p.value.mutable_grad().mul_(1e-14);  // noise of a mathematically zero gradient
      noisy.insert(p.name);
    } else if (p.kind == ParamKind::kExperts) {
      p.value.mutable_grad()[3].zero_();  // one expert of a stack
    }
  });
  optimizer.step(0.1);
  model.visit([&](Parameter& p) {
    if (still.contains(p.name) || noisy.contains(p.name)) {
      EXPECT_TRUE(same_bits(p.value, before.at(p.name))) << p.name;
    } else if (p.kind == ParamKind::kExperts) {
      EXPECT_TRUE(same_bits(p.value[3], before.at(p.name)[3])) << p.name;
      EXPECT_FALSE(at::equal(p.value[2], before.at(p.name)[2])) << p.name;
    }
  });
  EXPECT_GE(still.size(), 5u);
}

TEST(Optimizer, AnAbsentGradientIsNoStep) {
  model::Transformer model = make_model();
  Optimizer optimizer(model, {});
  const auto before = snapshot(model);
  set_gradients(model, 7);
  model.visit([](Parameter& p) {
    if (p.name.starts_with("mtp.")) p.value.mutable_grad().reset();
  });
  optimizer.step(0.1);
  model.visit([&](Parameter& p) {
    EXPECT_EQ(same_bits(p.value, before.at(p.name)), p.name.starts_with("mtp.") || !p.trainable())
        << p.name;
  });
}

// How matrices are stacked in storage changes no bit of any: experts of one tensor, the groups of
// wo_a, the halves of a compressor, and the company of other tensors of the same shape.
TEST(Optimizer, StorageFusionChangesNoBit) {
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    model::Transformer model = make_model(type);
    Optimizer optimizer(model, {.weight_decay = 0.0});
    set_gradients(model, 8);
    std::map<std::string, at::Tensor> grads;
    model.visit([&](Parameter& p) {
      if (p.trainable()) grads[p.name] = p.value.grad().clone();
      if (update_rule(p) == UpdateRule::kMuon) {
        at::NoGradGuard no_grad;
        p.value.zero_();  // so that the update is all there is
      }
    });
    optimizer.step(1.0);
    int units = 0;
    model.visit([&](Parameter& p) {
      if (update_rule(p) != UpdateRule::kMuon) return;
      const at::Tensor g = grads.at(p.name).reshape({p.units, -1, p.shape.back()});
      const double factor = std::sqrt(static_cast<double>(std::max(g.size(1), g.size(2)))) * 0.18;
      const at::Tensor found = p.value.detach().reshape(g.sizes());
      for (int64_t unit = 0; unit < p.units; ++unit) {
        const at::Tensor own = g.narrow(0, unit, 1);
        const at::Tensor alone = ops::newton_schulz(own * 0.95 + own)[0] * factor;
        EXPECT_TRUE(same_bits(found[unit], -alone)) << p.name << " unit " << unit << " of " << type;
        ++units;
      }
    });
    EXPECT_GT(units, 200);
  }
}

TEST(Optimizer, FirstAdamStepIsTheSignOfTheGradient) {
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    model::Transformer model = make_model(type);
    Optimizer optimizer(model, {});
    const auto before = snapshot(model);
    set_gradients(model, 9);
    optimizer.step(0.01);
    model.visit([&](Parameter& p) {
      const UpdateRule rule = update_rule(p);
      if (rule != UpdateRule::kAdam && rule != UpdateRule::kAdamDecay) return;
      const double decay = rule == UpdateRule::kAdamDecay ? 1.0 - 0.01 * 0.1 : 1.0;
      const at::Tensor expected = before.at(p.name) * decay - at::sign(p.value.grad()) * 0.01;
      const double bar = type == at::kFloat ? 2e-6 : 1e-14;
      EXPECT_LT((p.value.detach() - expected).abs().max().item<double>(), bar) << p.name;
    });
  }
}

TEST(Optimizer, AdamIsTheTextbookOverSteps) {
  model::Transformer model = make_model();
  Optimizer optimizer(model, {});
  std::map<std::string, at::Tensor> m, v, w = snapshot(model);
  for (int step = 1; step <= 4; ++step) {
    set_gradients(model, 20 + static_cast<uint64_t>(step));
    optimizer.step(0.003);
    model.visit([&](Parameter& p) {
      const UpdateRule rule = update_rule(p);
      if (rule != UpdateRule::kAdam && rule != UpdateRule::kAdamDecay) return;
      const at::Tensor g = p.value.grad();
      if (step == 1) m[p.name] = v[p.name] = at::zeros_like(g);
      m[p.name] = m[p.name] * 0.9 + g * 0.1;
      v[p.name] = v[p.name] * 0.95 + g * g * 0.05;
      const at::Tensor update = (m[p.name] / (1 - std::pow(0.9, step))) /
                                (at::sqrt(v[p.name] / (1 - std::pow(0.95, step))) + 1e-20);
      if (rule == UpdateRule::kAdamDecay) w[p.name] = w[p.name] * (1 - 0.003 * 0.1);
      w[p.name] = w[p.name] - update * 0.003;
      EXPECT_LT((p.value.detach() - w[p.name]).abs().max().item<double>(), 1e-13) << p.name;
    });
  }
}

TEST(Optimizer, AnEntryThatNeverHadAGradientStaysInPlace) {
  model::Transformer model = make_model(at::kFloat);
  Optimizer optimizer(model, {});
  const auto before = snapshot(model);
  set_gradients(model, 10);
  model.visit([](Parameter& p) {
    if (p.kind == ParamKind::kNorm) p.value.mutable_grad()[1] = 0.0;
  });
  optimizer.step(0.1);
  model.visit([&](Parameter& p) {
    if (p.kind != ParamKind::kNorm) return;
    EXPECT_EQ(p.value[1].item<float>(), before.at(p.name)[1].item<float>()) << p.name;
    EXPECT_TRUE(at::isfinite(p.value).all().item<bool>()) << p.name;
  });
}

TEST(Optimizer, ClippingScalesToTheNormAndNeverUp) {
  model::Transformer model = make_model();
  Optimizer optimizer(model, {});
  set_gradients(model, 11);
  const double norm = optimizer.grad_norm().item<double>();
  EXPECT_NEAR(optimizer.clip_gradients(2.0 * norm).item<double>(), norm, 1e-9);
  EXPECT_NEAR(optimizer.grad_norm().item<double>(), norm, 1e-9);
  EXPECT_NEAR(optimizer.clip_gradients(1.0).item<double>(), norm, 1e-9);
  EXPECT_NEAR(optimizer.grad_norm().item<double>(), 1.0, 1e-9);
}

}  // namespace
}  // namespace hadal::train
