// Answers as their tokens come: nothing is filtered, masked or shown.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "engine_core/request.h"
#include "engine_core/sampler.h"

namespace hadal::testing {

class NoFilter final : public engine_core::AnswerFilter {
 public:
  bool masks_tokens() const override { return false; }
  std::vector<std::span<const int32_t>> masks(std::span<const int64_t> draft) override {
    return std::vector<std::span<const int32_t>>(1 + draft.size());
  }
  Accepted accept(int64_t) override { return {}; }
  std::string finish() override { return {}; }
};
class NoFilters final : public engine_core::AnswerFilters {
 public:
  std::unique_ptr<engine_core::AnswerFilter> create(const engine_core::Request&) override {
    return std::make_unique<NoFilter>();
  }
};

}  // namespace hadal::testing
