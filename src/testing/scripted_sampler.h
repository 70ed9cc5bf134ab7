// How tests draw and filter tokens: noise of a hash, letters for texts. Included by tests only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine_core/sampler.h"

namespace hadal::testing {

inline uint64_t scripted_mix(uint64_t state, uint64_t value) {
  state = (state ^ (value + 0x9e3779b97f4a7c15ull)) * 0xbf58476d1ce4e5b9ull;
  return state ^ (state >> 27);
}

/// The largest of logit + temperature x noise of (seed, choice, position, token).
class ScriptedSampler : public engine_core::Sampler {
 public:
  void sample(std::span<const engine_core::DrawInput> inputs,
              std::span<engine_core::Sampled> sampled) override {
    for (size_t i = 0; i < inputs.size(); ++i)
      sampled[i] = sample(inputs[i].draw, inputs[i].logits);
  }
  static engine_core::Sampled sample(const engine_core::Draw& draw, std::span<const float> logits) {
    engine_core::Sampled best;
    double best_score = 0;
    bool any = false;
    for (size_t token = 0; token < logits.size(); ++token) {
      if (!draw.mask.empty() &&
          ((static_cast<uint32_t>(draw.mask[token / 32]) >> (token % 32)) & 1u) == 0) {
        continue;
      }
      if (std::ranges::count(draw.avoided, static_cast<int64_t>(token)) > 0) continue;
      uint64_t key = scripted_mix(draw.sampling->seed, static_cast<uint64_t>(draw.choice));
      key = scripted_mix(key, static_cast<uint64_t>(draw.pos));
      const auto noise = static_cast<double>(scripted_mix(key, token) >> 40);
      const double score = static_cast<double>(logits[token]) + draw.sampling->temperature * noise;
      if (any && score <= best_score) continue;
      any = true;
      best_score = score;
      best.token = static_cast<int64_t>(token);
    }
    best.logprob = best_score;
    if (draw.sampled_logprob) best.sampled_logprob = best_score / 2;
    return best;
  }
  /// The logit itself, and a digest of all as the rank.
  engine_core::TokenScore score(std::span<const float> logits,
                                int64_t token,
                                int64_t top) const override {
    uint64_t all = 0;
    for (const float logit : logits) all = scripted_mix(all, static_cast<uint64_t>(logit));
    engine_core::TokenScore score{.logprob = logits[static_cast<size_t>(token)],
                                  .rank = static_cast<int64_t>(all >> 1),
                                  .top = {}};
    for (int64_t other = 0; other < top; ++other)
      score.top.push_back({.token = other, .logprob = logits[static_cast<size_t>(other)]});
    return score;
  }
};

/// Every token's text is one letter; Request::stop are matched without holding back. With a grammar
/// the i-th token is one of those equal to i modulo 3, and nine tokens are complete.
class ScriptedFilters : public engine_core::AnswerFilters {
 public:
  std::unique_ptr<engine_core::AnswerFilter> create(const engine_core::Request& request) override {
    return std::make_unique<Filter>(*this, request);
  }
  /// For each answer with a grammar that is asked for masks: may throw; false: nothing may follow.
  std::function<bool()> on_masks;

 private:
  class Filter : public engine_core::AnswerFilter {
   public:
    Filter(const ScriptedFilters& filters, const engine_core::Request& request)
        : filters_(filters),
          stop_(request.stop),
          grammar_(request.grammar.kind != engine_core::Grammar::Kind::kNone) {}
    bool masks_tokens() const override { return grammar_; }
    std::vector<std::span<const int32_t>> masks(std::span<const int64_t> draft) override {
      std::vector<std::span<const int32_t>> all(1 + draft.size());
      if (!grammar_) return all;
      const bool any = !filters_.on_masks || filters_.on_masks();
      masks_.resize(std::max(masks_.size(), all.size()));
      for (size_t i = 0; i < all.size(); ++i) {
        uint32_t bits = 0;
        for (size_t token = (text_.size() + i) % 3; token < 32; token += 3)
          bits |= any ? uint32_t{1} << token : 0;
        masks_[i].assign(8, static_cast<int32_t>(bits));
        all[i] = masks_[i];
      }
      return all;
    }
    Accepted accept(int64_t token) override {
      const std::string letter(1, static_cast<char>('A' + token % 26));
      text_ += letter;
      for (const std::string& stop : stop_) {
        if (text_.ends_with(stop)) {
          return {.verdict = Verdict::kStopString, .text = "", .matched_stop = stop};
        }
      }
      const bool complete = grammar_ && text_.size() == 9;
      return {.verdict = complete ? Verdict::kComplete : Verdict::kContinue,
              .text = letter,
              .matched_stop = ""};
    }
    std::string finish() override { return "."; }

   private:
    const ScriptedFilters& filters_;
    std::vector<std::string> stop_;
    bool grammar_;
    std::vector<std::vector<int32_t>> masks_;
    std::string text_;
  };
};

}  // namespace hadal::testing
