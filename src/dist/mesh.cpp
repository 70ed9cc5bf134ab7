#include "dist/mesh.h"

#include <utility>

#include "base/check.h"
#include "base/join.h"

namespace hadal::dist {

Mesh::Mesh(int64_t ranks, const MeshShape& shape) : ranks_(ranks), shape_(shape) {
  HADAL_CHECK(ranks >= 1, "mesh: ", ranks, " ranks");
  const std::pair<const char*, int64_t> axes[] = {
      {"pipeline", shape.pipeline}, {"context", shape.context}, {"expert", shape.expert}};
  for (const auto& [name, count] : axes)
    HADAL_INPUT_CHECK(count >= 1, "mesh.", name, ": expected 1 or more, found ", count);
  const int64_t cut = shape.pipeline * shape.context;
  HADAL_INPUT_CHECK(ranks % cut == 0, "mesh: pipeline ", shape.pipeline, " x context ",
                    shape.context, " = ", cut, " does not divide the number of ranks, ", ranks);
  data_ = ranks / cut;
  const int64_t sharing = ranks / shape.pipeline;
  HADAL_INPUT_CHECK(sharing % shape.expert == 0, "mesh.expert: ", shape.expert,
                    " does not divide the ", sharing, " ranks that share layers");
}

MeshPlace Mesh::place(int64_t rank) const {
  HADAL_CHECK(rank >= 0 && rank < ranks_, "mesh: rank ", rank, " of ", ranks_);
  return {.pipeline = rank / (data_ * shape_.context),
          .data = rank / shape_.context % data_,
          .context = rank % shape_.context};
}

int64_t Mesh::rank(const MeshPlace& place) const {
  return (place.pipeline * data_ + place.data) * shape_.context + place.context;
}

std::vector<int64_t> Mesh::pipeline_group(int64_t rank) const {
  MeshPlace at = place(rank);
  std::vector<int64_t> group;
  for (at.pipeline = 0; at.pipeline < shape_.pipeline; ++at.pipeline)
    group.push_back(this->rank(at));
  return group;
}

std::vector<int64_t> Mesh::data_group(int64_t rank) const {
  MeshPlace at = place(rank);
  std::vector<int64_t> group;
  for (at.data = 0; at.data < data_; ++at.data) group.push_back(this->rank(at));
  return group;
}

std::vector<int64_t> Mesh::context_group(int64_t rank) const {
  MeshPlace at = place(rank);
  std::vector<int64_t> group;
  for (at.context = 0; at.context < shape_.context; ++at.context) group.push_back(this->rank(at));
  return group;
}

std::vector<int64_t> Mesh::expert_group(int64_t rank) const {
  std::vector<int64_t> group;
  const int64_t first = rank - expert(rank);
  for (int64_t i = 0; i < shape_.expert; ++i) group.push_back(first + i);
  return group;
}

std::string describe(const Mesh& mesh) {
  std::vector<std::string> axes;
  const auto axis = [&](const char* name, int64_t count) {
    if (count > 1) axes.push_back(concat(name, " ", count));
  };
  axis("pipeline", mesh.shape().pipeline);
  axis("data", mesh.data());
  axis("context", mesh.shape().context);
  std::string text;
  for (const std::string& each : axes) text += (text.empty() ? "" : " x ") + each;
  if (text.empty()) text = "one rank";
  if (mesh.shape().expert > 1) text += concat(", experts over ", mesh.shape().expert);
  return text;
}

}  // namespace hadal::dist
