// The draws of sample.h where the logits lie on a Hopper card, by the kernels of sample_sm90.h: the
// same tokens.
#pragma once

#include <cstdint>
#include <span>

#include <ATen/core/Tensor.h>

#include "ops/sampling/sample.h"
#include "ops/sampling/sample_sm90.h"

namespace hadal::ops {

/// What decides whether the kernels can draw.
struct DrawShape {
  const Sampling& sampling;
  int64_t num_avoided = 0;
  int64_t top_logprobs = -1;
  bool sampled_logprob = false;
  int64_t vocab = 0, stride = 0;  ///< logits that count, and from row to row
};
bool serves_draw_sm90(const DrawShape& shape);

/// A DrawRow whose logits are a row on the card.
struct DeviceDrawRow {
  int64_t row = 0;
  Adjustment adjustment;
  int64_t position = 0, choice = 0, top_logprobs = -1;
};

/// Draws as draw_rows() does from the first `vocab` of logits [rows, stride] FP32 on a GPU: behind
/// what is launched there so far, while the host goes on.
class LaunchedDraws {
 public:
  /// Errors: Error for a biased, penalised or avoided token outside the row.
  LaunchedDraws(const at::Tensor& logits, int64_t vocab, std::span<const DeviceDrawRow> rows);
  /// Waits for the tokens of all rows, in order.
  std::vector<Drawn> read();

 private:
  at::Tensor logits_, sent_, result_, host_;
  std::vector<int64_t> top_logprobs_;                                    ///< asked for, by row
  int64_t most_ = -1;                                                    ///< of those
  int64_t tokens_ = 0, top_tokens_ = 0, logprob_ = 0, top_logprob_ = 0;  ///< offsets in `host_`
};

/// The kernels' inputs in host memory: what draw_rows_sm90 sends, one row of logits for each.
struct DrawTables {
  std::vector<SamplingRowSm90> rows;
  std::vector<LogitChangeSm90> changes;
  std::vector<uint32_t> masks;  ///< of mask_words each
  std::vector<int32_t> avoided;
  int64_t mask_words = 0;
};
DrawTables draw_tables(int64_t vocab, std::span<const DeviceDrawRow> rows);

}  // namespace hadal::ops
