#include "model/shard.h"

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "model/parameter.h"

namespace hadal::model {
namespace {

TEST(Shard, PartsMakeTheWhole) {
  const at::Tensor whole = at::arange(48).reshape({6, 8});
  for (const int64_t axis : {0, 1}) {
    std::vector<at::Tensor> parts;
    for (int64_t part = 0; part < 2; ++part) {
      const Shard shard = Shard::even(axis, whole.size(axis), part, 2);
      EXPECT_EQ(at::IntArrayRef(shard.of(whole.sizes().vec())), shard.of(whole).sizes());
      parts.push_back(shard.of(whole));
    }
    EXPECT_TRUE(at::equal(at::cat(parts, axis), whole));
  }
  EXPECT_TRUE(Shard{}.whole());
  EXPECT_TRUE(at::equal(Shard{}.of(whole), whole));
}

TEST(Shard, LiesInsideItsParameter) {
  EXPECT_THROW(Shard::even(0, 6, 2, 2), Error);
  EXPECT_THROW(Shard::even(0, 7, 0, 2), Error);
  const std::vector<int64_t> shape{6, 8};
  for (const Shard& bad : {Shard{.axis = 2, .parts = 2, .offset = 0, .length = 1},
                           Shard{.axis = 0, .parts = 2, .offset = 4, .length = 3},
                           Shard{.axis = 0, .parts = 2, .offset = 0, .length = 0},
                           Shard{.axis = 0, .part = 2, .parts = 2, .offset = 0, .length = 1}}) {
    EXPECT_THROW(bad.of(shape), Error);
  }
}

TEST(Shard, DoesNotCutThroughAUnit) {
  Parameter p;
  p.kind = ParamKind::kGroups;
  p.shape = {12, 4};
  p.units = 3;  // groups of four rows
  p.shard = Shard::even(0, 12, 1, 3);
  EXPECT_EQ(p.local_units(), 1);
  EXPECT_EQ(p.local_matrices(), 1);
  p.shard = {.axis = 0, .part = 0, .parts = 2, .offset = 0, .length = 8};
  EXPECT_EQ(p.local_units(), 2);
  p.shard = Shard::even(0, 12, 0, 2);
  EXPECT_THROW(p.local_units(), Error);
}

}  // namespace
}  // namespace hadal::model
