#include "dist/mesh.h"

#include <array>
#include <set>
#include <string>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::dist {
namespace {

std::string complaint(int64_t ranks, const MeshShape& shape) {
  try {
    const Mesh mesh(ranks, shape);
  } catch (const InputError& error) {
    return error.what();
  }
  return "none";
}

TEST(Mesh, EveryRankHasOnePlace) {
  for (const MeshShape& shape : {MeshShape{}, MeshShape{.pipeline = 2}, MeshShape{.context = 4},
                                 MeshShape{.pipeline = 3, .context = 2, .expert = 4}}) {
    const Mesh mesh(24, shape);
    std::set<std::array<int64_t, 3>> places;
    for (int64_t rank = 0; rank < 24; ++rank) {
      const MeshPlace at = mesh.place(rank);
      EXPECT_EQ(mesh.rank(at), rank);
      places.insert({at.pipeline, at.data, at.context});
    }
    EXPECT_EQ(places.size(), 24u);
    EXPECT_EQ(mesh.data() * shape.pipeline * shape.context, 24);
  }
}

TEST(Mesh, GroupsDifferAlongOneAxis) {
  const Mesh mesh(12, {.pipeline = 2, .context = 3, .expert = 2});
  EXPECT_EQ(mesh.data(), 2);
  EXPECT_EQ(mesh.place(7), (MeshPlace{.pipeline = 1, .data = 0, .context = 1}));
  EXPECT_EQ(mesh.pipeline_group(7), (std::vector<int64_t>{1, 7}));
  EXPECT_EQ(mesh.data_group(7), (std::vector<int64_t>{7, 10}));
  EXPECT_EQ(mesh.context_group(7), (std::vector<int64_t>{6, 7, 8}));
  EXPECT_EQ(mesh.expert_group(7), (std::vector<int64_t>{6, 7}));
  EXPECT_EQ(mesh.expert(7), 1);
  EXPECT_EQ(describe(mesh), "pipeline 2 x data 2 x context 3, experts over 2");
  EXPECT_EQ(describe(Mesh()), "one rank");
}

TEST(Mesh, WhatDoesNotDivideIsNamed) {
  EXPECT_EQ(complaint(6, {.context = 4}),
            "mesh: pipeline 1 x context 4 = 4 does not divide the number of ranks, 6");
  EXPECT_EQ(complaint(6, {.pipeline = 2, .expert = 2}),
            "mesh.expert: 2 does not divide the 3 ranks that share layers");
  EXPECT_EQ(complaint(6, {.pipeline = 0}), "mesh.pipeline: expected 1 or more, found 0");
}

}  // namespace
}  // namespace hadal::dist
