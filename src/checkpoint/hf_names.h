// Names of Hugging Face transformers for the tensors of a V4 (model.md 5.4), and where each of ours
// lies in such a checkpoint.
//
// transformers stacks the routed experts of a layer into two tensors and has no MTP block; ours is
// written beside it under its official names.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/names.h"

namespace hadal::checkpoint {

/// A tensor, or rows of one expert of a stacked tensor.
struct HfPlace {
  std::string name;
  int64_t expert = -1;    ///< -1: the whole tensor
  int64_t first_row = 0;  ///< of the expert's matrix
  int64_t num_rows = 0;

  bool is_stacked() const { return expert >= 0; }
};

/// Where transformers keeps this tensor. Names it does not know (the MTP block) stay as they are.
HfPlace hf_place(const TensorSpec& spec);

/// The name that older versions of transformers wrote for the same tensor, or "".
std::string older_hf_name(const std::string& hf_name);

/// "x.weight" -> "x.weight_scale_inv"; "experts.gate_up_proj" -> "experts.gate_up_proj_scale_inv".
std::string hf_scale_name(const std::string& hf_name);

/// Whether these names are transformers' names.
bool are_hf_names(const std::vector<std::string>& names);

}  // namespace hadal::checkpoint
