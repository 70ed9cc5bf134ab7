// Samplers of the engine over ops::draw_rows.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include <ATen/core/Tensor.h>

#include "engine_core/sampler.h"

namespace hadal::engine {

/// A token to draw from a row on a GPU.
struct DeviceDraw {
  const engine_core::Draw* draw = nullptr;
  int64_t row = 0;                          ///< of the step's logits
  engine_core::Sampled* sampled = nullptr;  ///< the answer
};

/// A sampler that draws where the logits are. Tokens are those of sample(); log-probabilities
/// differ from its by less than 4e-7.
class DeviceSampler {
 public:
  virtual ~DeviceSampler() = default;
  /// Whether it can: of a row of `row_size` logits.
  virtual bool serves(const engine_core::Draw& draw, int64_t row_size) const = 0;
  /// What it began.
  class Launched {
   public:
    virtual ~Launched() = default;
    /// Waits, and writes the answers.
    virtual void finish() = 0;
  };
  /// logits [rows, vocab] FP32 on a GPU. The draws are read now, their answers written by finish().
  virtual std::unique_ptr<Launched> launch(const at::Tensor& logits,
                                           std::span<const DeviceDraw> draws) = 0;
};

class ModelSampler final : public engine_core::Sampler, public DeviceSampler {
 public:
  /// Ids from `vocab_size` on have no text and are never chosen.
  explicit ModelSampler(int64_t vocab_size) : vocab_size_(vocab_size) {}
  bool serves(const engine_core::Draw& draw, int64_t row_size) const override;
  std::unique_ptr<Launched> launch(const at::Tensor& logits,
                                   std::span<const DeviceDraw> draws) override;
  void sample(std::span<const engine_core::DrawInput> inputs,
              std::span<engine_core::Sampled> sampled) override;
  engine_core::TokenScore score(std::span<const float> logits,
                                int64_t token,
                                int64_t top) const override;

 private:
  int64_t num_with_text(int64_t row_size) const;
  std::span<const float> with_text(std::span<const float> logits) const;
  int64_t vocab_size_;
};

}  // namespace hadal::engine
