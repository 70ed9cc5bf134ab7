// The names that checkpoints give the tensors of a V4: the official ones, those of Hugging Face
// transformers' modules (checkpoints.md) and of what it saves, and where each tensor lies under
// them.
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

/// "x.weight" -> "x.weight_scale_inv"; "experts.gate_up_proj" -> "experts.gate_up_proj_scale_inv".
std::string hf_scale_name(const std::string& hf_name);

/// Conventions that checkpoints name their tensors by; for messages, because a tensor is read under
/// any of them.
enum class Naming {
  kOfficial,   ///< layers.0.attn.wq_a.weight
  kPrefixed,   ///< model.layers.0.attn.wq_a.weight, model.embed.weight
  kHfModules,  ///< model.layers.0.self_attn.q_a_proj.weight, experts stacked or one by one
  kHfSaved,    ///< what save_pretrained makes of it: official names or module names, component by
               ///< component, depending on where the model came from
};
/// As it is called in messages.
const char* naming_name(Naming naming);

/// The convention of a list of names; official where nothing tells.
Naming naming_of(const std::vector<std::string>& names);

/// How a tensor that is missing would be called.
std::string expected_name(const TensorSpec& spec, Naming naming);

/// The official name that a name of any convention, or of a mixture of them, stands for. Stacked
/// experts become "layers.0.ffn.experts.*.w13" and "layers.0.ffn.experts.*.w2". A name that stands
/// for nothing known comes back in parts unchanged, and is no tensor of the table.
std::string official_name(const std::string& name);

}  // namespace hadal::checkpoint
