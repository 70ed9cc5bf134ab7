// The parameters of a model: the one list of them.
//
// describe() walks it for a configuration; the parameters without values (declare), the visitor of
// a model (Transformer::visit) and the table of a checkpoint's tensors (checkpoint/names.h, by way
// of declared_in_file_order) follow from it. To add a parameter, add a member and its line in
// describe.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "model/block.h"
#include "model/config.h"
#include "model/drafter.h"
#include "model/mtp.h"
#include "model/parameter.h"

namespace hadal::model {

/// What a parameter belongs to, for the census.
enum class Part {
  kEmbedding,
  kHead,
  kAttention,
  kCompressor,
  kIndexer,
  kNorm,
  kHyper,
  kRouter,
  kShared,
  kExperts,
  kMtpProjection
};
inline constexpr int kNumParts = 11;

/// What is said of a parameter where it is declared.
struct Field {
  std::string name;
  ParamKind kind;
  Storage storage;
  std::vector<int64_t> shape;
  ops::GemmRole role;
  int64_t units;
  Part part;
  int64_t block;  ///< index of the layer; n_layers for the MTP block or the drafter's first stage;
                  ///< -1 at the top

  Parameter parameter() const;
};

struct ModelParameters {
  Parameter embed, head, norm;
  HyperConnection hc_head;
  std::vector<Block> blocks;
  std::optional<Mtp> mtp;
  Drafter drafter;  ///< no stages: none
};

/// Meets the fields of a model in the order in which it is visited: the order of optimizer states
/// and of sums over all parameters.
class FieldVisitor {
 public:
  virtual ~FieldVisitor() = default;
  virtual void field(Parameter& parameter, const Field& field) = 0;
  /// Fields and groups until end() lie together in an official file; `front` says where among
  /// their neighbours in the enclosing group: higher ones first, equal ones as visited.
  virtual void begin(int /*front*/) {}
  virtual void end() {}
};

/// Gives `parameters` the members that the configuration asks for and visits all of them.
void describe(const ModelConfig& config, ModelParameters& parameters, FieldVisitor& visitor);
/// Likewise one block of it; index n_layers: the MTP block's.
void describe(const ModelConfig& config, int64_t index, Block& block, FieldVisitor& visitor);

/// Every parameter of the model with name, role and shape but no value.
ModelParameters declare(const ModelConfig& config);
/// Those of the model in the order of the official files: top, layers, MTP block
/// or stages of the drafter.
std::vector<Field> declared_in_file_order(const ModelConfig& config);

}  // namespace hadal::model
