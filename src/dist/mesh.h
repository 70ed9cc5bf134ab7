// Which part of a step's work a rank does: the axes of a run's mesh (docs/parallelism.md).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hadal::dist {

/// Ranks along each axis. What the number of ranks leaves over is the data axis.
struct MeshShape {
  int64_t pipeline = 1;  ///< layers: each rank has a run of them
  int64_t context = 1;   ///< places of a row
  int64_t expert = 1;    ///< routed experts: of the ranks that share layers
  bool operator==(const MeshShape&) const = default;
};

/// Where a rank stands.
struct MeshPlace {
  int64_t pipeline = 0, data = 0, context = 0;
  bool operator==(const MeshPlace&) const = default;
};

/// rank = (pipeline * data ranks + data) * context ranks + context: neighbours in a row are
/// neighbours in number, and with them the ranks of one host. An expert group is `expert` ranks in
/// a row of one pipeline stage; the k-th of them holds the k-th run of every layer's experts.
class Mesh {
 public:
  /// One rank.
  Mesh() = default;
  /// Errors: InputError naming the axis where the ranks cannot be divided so.
  Mesh(int64_t ranks, const MeshShape& shape);

  int64_t ranks() const { return ranks_; }
  int64_t data() const { return data_; }
  const MeshShape& shape() const { return shape_; }

  MeshPlace place(int64_t rank) const;
  int64_t rank(const MeshPlace& place) const;
  /// The place among the experts of the group.
  int64_t expert(int64_t rank) const { return rank % shape_.expert; }

  /// The ranks that differ from this one along one axis alone, itself among them, ascending.
  std::vector<int64_t> pipeline_group(int64_t rank) const;
  std::vector<int64_t> data_group(int64_t rank) const;
  std::vector<int64_t> context_group(int64_t rank) const;
  std::vector<int64_t> expert_group(int64_t rank) const;

 private:
  int64_t ranks_ = 1, data_ = 1;
  MeshShape shape_;
};

/// "data 2 x context 4, experts over 8"
std::string describe(const Mesh& mesh);

}  // namespace hadal::dist
