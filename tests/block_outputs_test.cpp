// What blocks return beside their streams: the values, recorded when they still left by callbacks,
// and that asking for them changes no bit.
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/hash.h"
#include "checkpoint/load_model.h"
#include "model/transformer.h"
#include "ops/cache/batch.h"

namespace hadal {
namespace {

using model::AttentionMode;
using ops::Numerics;

/// By name, block after block.
using Values = std::map<std::string, std::vector<at::Tensor>>;

struct Pass {
  const char* folder;
  Numerics numerics;
  AttentionMode mode;
};

constexpr model::AuxRequest kEverything{.experts = true,
                                        .routing = true,
                                        .swiglu = true,
                                        .selection = true,
                                        .index_scores = true,
                                        .index_loss = true,
                                        .attention = true};

/// Three sequences in one step through a small checkpoint, MTP block included.
class Step {
 public:
  explicit Step(const Pass& pass)
      : pass_(pass),
        model_(checkpoint::load_model(
            checkpoint::OfficialCheckpoint::open(concat(HADAL_SOURCE_DIR, "/", pass.folder)),
            pass.numerics)) {
    std::vector<int64_t> numbers;
    for (int64_t i = 0; i < batch_.num_tokens(); ++i)
      numbers.push_back((i * i * 31 + 17 * i + 5) % model_.config().vocab_size);
    ids_ = at::tensor(numbers, at::kLong);
  }

  model::ForwardContext context() const {
    model::ForwardContext context;
    context.batch = &batch_;
    context.numerics = pass_.numerics;
    context.mode = pass_.mode;
    return context;
  }

  Values values() const {
    Values values;
    model::ForwardContext context = this->context();
    context.request = kEverything;
    model::ForwardOutput output = model_.forward(ids_, context);
    if (model_.config().n_mtp_layers > 0)
      output.aux.push_back(model_.mtp(output.streams, ids_.roll(-1), context).aux);
    for (const model::BlockAux& aux : output.aux) {
      values["experts"].push_back(aux.moe.routing.experts);
      values["weights"].push_back(aux.moe.routing.weights);
      values["affinity"].push_back(aux.moe.routing.affinity);
      for (const model::SwigluInput& input : aux.moe.swiglu) {
        values["gate"].push_back(input.gate);
        values["up"].push_back(input.up);
      }
      if (aux.attn.selection.defined()) values["selection"].push_back(aux.attn.selection);
      if (aux.attn.index_scores.defined()) values["scores"].push_back(aux.attn.index_scores);
      if (aux.attn.index_loss.sum.defined())
        values["index_loss"].push_back(aux.attn.index_loss.sum /
                                       static_cast<double>(aux.attn.index_loss.num_queries));
      values["q"].push_back(aux.attn.seen.q);
      if (aux.attn.seen.blocks.rows.defined())
        values["blocks"].push_back(aux.attn.seen.blocks.rows);
      values["lse"].push_back(aux.attn.seen.lse);
    }
    return values;
  }

  model::ForwardOutput forward(const model::AuxRequest& request) const {
    model::ForwardContext context = this->context();
    context.request = request;
    return model_.forward(ids_, context);
  }

 private:
  Pass pass_;
  model::Transformer model_;
  ops::Batch batch_{{150, 37, 5}, {0, 0, 0}, at::kCPU};
  at::Tensor ids_;
};

std::string digest(const std::vector<at::Tensor>& list) {
  uint64_t state = fnv1a64("");
  for (const at::Tensor& x : list) {
    const at::Tensor dense = x.contiguous();
    state = fnv1a64({static_cast<const char*>(dense.const_data_ptr()),
                     static_cast<size_t>(dense.numel() * dense.element_size())},
                    state);
  }
  char text[24];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(state));
  return text;
}

/// What callbacks were given before blocks returned it. Everything on a token's path is the same
/// bits on every machine; the indexer's loss is a library's sum.
struct Recorded {
  Pass pass;
  double index_loss;  ///< of the first CSA layer, a query
  std::map<std::string, std::string> digests;
};

const Recorded kRecorded[] = {
    {{"tests/golden-tiny/ideal", Numerics::kIdeal, AttentionMode::kSparse},
     0.187090993,
     {{"affinity", "8cd3697c05b17d5d"},
      {"blocks", "7e1633c220213c63"},
      {"experts", "8c4f4e0ca429eca7"},
      {"gate", "390f9aa5d7df5f31"},
      {"lse", "2186885ebadbcad4"},
      {"q", "6e8f8e595e629235"},
      {"scores", "018cb3501e8f4c93"},
      {"selection", "45dd92cade102f30"},
      {"up", "b7201cdd0ee92111"},
      {"weights", "c084f56d0affdc20"}}},
    {{"tests/golden-tiny/ideal", Numerics::kIdeal, AttentionMode::kIndexerWarmup},
     0.40639621,
     {{"affinity", "7c94a0d0ffb12797"},
      {"blocks", "09cc58bd641ec3a8"},
      {"experts", "ee046a8b9626ef46"},
      {"gate", "b382441c7734e391"},
      {"lse", "76da4eb5c99f7520"},
      {"q", "47b916d23c879eeb"},
      {"up", "cb25661739b69402"},
      {"weights", "30f8b2f28af0edeb"}}},
    {{"tests/golden-tiny/released", Numerics::kBf16, AttentionMode::kSparse},
     0.201045379,
     {{"affinity", "9634ae5f3152bfee"},
      {"blocks", "d7f4ab98629f6887"},
      {"experts", "3972ce02cf6243e4"},
      {"gate", "b9524b785faa2bba"},
      {"lse", "66bf686f73838cdd"},
      {"q", "e403215187f87fca"},
      {"scores", "6b8f7e711ba627b4"},
      {"selection", "4da5590ae9f23d97"},
      {"up", "bc55eed71a649439"},
      {"weights", "be8f82ad3ed7866a"}}},
    {{"tests/golden-tiny/released", Numerics::kReleased, AttentionMode::kSparse},
     0.198581964,
     {{"affinity", "1e8027ba58257706"},
      {"blocks", "4dc09ba94c41b5ce"},
      {"experts", "01d7efc7dbff41e5"},
      {"gate", "cc2b81ef772e23da"},
      {"lse", "b754ce500a20955d"},
      {"q", "270445250c59f4bc"},
      {"scores", "8ae01536f33ac595"},
      {"selection", "e2adec33f68b26b1"},
      {"up", "672fe8234c94c579"},
      {"weights", "c1c79be6bd8fbffe"}}},
};

TEST(BlockOutputs, AuxIsWhatCallbacksWereGiven) {
  const at::NoGradGuard no_grad;
  for (const Recorded& recorded : kRecorded) {
    SCOPED_TRACE(concat(recorded.pass.folder, ' ', ops::numerics_name(recorded.pass.numerics), ' ',
                        static_cast<int>(recorded.pass.mode)));
    const Values values = Step(recorded.pass).values();
    for (const auto& [name, expected] : recorded.digests) {
      ASSERT_TRUE(values.contains(name)) << name;
      EXPECT_EQ(digest(values.at(name)), expected) << name;
    }
    const double loss = values.at("index_loss").at(0).item<double>();
    EXPECT_NEAR(loss, recorded.index_loss, 1e-4 * recorded.index_loss);
  }
}

TEST(BlockOutputs, AskingChangesNoBitAndNothingElseIsKept) {
  const at::NoGradGuard no_grad;
  for (const Recorded& recorded : kRecorded) {
    const Step step(recorded.pass);
    const model::ForwardOutput plain = step.forward({});
    for (const model::BlockAux& aux : plain.aux) {
      const ops::Routing& routing = aux.moe.routing;
      for (const at::Tensor& x :
           {routing.experts, routing.weights, routing.affinity, aux.attn.selection,
            aux.attn.index_scores, aux.attn.index_loss.sum, aux.attn.seen.q, aux.attn.seen.lse,
            aux.attn.seen.blocks.rows})
        EXPECT_FALSE(x.defined());
      EXPECT_TRUE(aux.moe.swiglu.empty());
    }
    for (const model::AuxRequest& request :
         {kEverything, model::AuxRequest{.index_scores = true},
          model::AuxRequest{.selection = true}, model::AuxRequest{.experts = true}})
      EXPECT_TRUE(at::equal(step.forward(request).streams, plain.streams));
    EXPECT_FALSE(step.forward({.experts = true}).aux[0].moe.routing.affinity.defined());
  }
}

}  // namespace
}  // namespace hadal
