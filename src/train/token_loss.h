// The cross-entropy of a pass, of whole rows or of a part of one.
#pragma once

#include <ATen/core/Tensor.h>

#include "model/row_part.h"
#include "model/transformer.h"

namespace hadal::train {

/// A leaf of a parameter's values whose gradient is that of one use of them.
at::Tensor leaf_of_parameter(const at::Tensor& value);

/// The head in one loss over a part of a row. The gradient of its leaf is a node of the row's tree
/// before the loss's factor; on one rank the factor comes after the sum, too.
struct HeadUse {
  at::Tensor leaf;
  at::Tensor factor;  ///< [] what the backward pass multiplied the loss with
};

/// sum of -log p over the tokens with a target (ops::linear_cross_entropy). `use`: of a part, what
/// the backward pass leaves there; null: gradients go to the head's values.
///   head  the model's head_operand()
at::Tensor token_loss(const model::Transformer& model,
                      const at::Tensor& head,
                      const at::Tensor& hidden,
                      const at::Tensor& targets,
                      HeadUse* use);

/// What a pass over a part of a row is told, and what it leaves beside the parameters' gradients:
/// the tree adds each use of a value for itself. Not to be moved before the backward pass is over.
struct PartPass {
  const model::RowPart* part = nullptr;
  at::Tensor mtp_embedding;  ///< leaf of the embedding in the MTP block
  HeadUse head, mtp_head;
};

}  // namespace hadal::train
