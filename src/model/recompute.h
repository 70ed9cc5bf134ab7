// A block whose graph is not kept: the backward pass computes it again.
#pragma once

#include "model/block.h"

namespace hadal::model {

/// block_forward(). Where the context says `recompute` and something asks for gradients, only the
/// streams before the block and its choices are kept, and the backward pass computes the block
/// again, forced to those choices: the gradients are the same bits wherever kernels serve (library
/// products of a reference may be other ones in a pass without gradients). Streams and auxiliary
/// terms are those of the first pass, so each term is counted once, and gradients come back through
/// all of them. The model has to live until then. A pass over a cache cannot be repeated:
/// with one it is an Error.
BlockOutput run_block(const Block& block,
                      const ModelConfig& config,
                      int64_t index,
                      at::Tensor streams,
                      const at::Tensor& ids,
                      const ops::RopeTable& compressed_rope,
                      const ForwardContext& context);

}  // namespace hadal::model
