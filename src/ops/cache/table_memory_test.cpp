#include "ops/cache/table_memory.h"

#include <numeric>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "testing/numbers_of.h"

namespace hadal::ops {
namespace {

using testing::numbers_of;

TEST(TableMemory, KeepsEachTableAtItsAddress) {
  TableMemory memory(at::kCPU);
  const auto step = [&](int64_t count) {
    memory.begin();
    std::vector<int64_t> numbers(static_cast<size_t>(count));
    std::iota(numbers.begin(), numbers.end(), count);
    const at::Tensor a = memory.place({"a", 0}, numbers, at::kLong),
                     b = memory.place({"b", 4}, numbers, at::kInt),
                     c = memory.place({"b", 128}, {}, at::kInt);
    memory.upload();
    EXPECT_EQ(numbers_of(a), numbers);
    EXPECT_EQ(numbers_of(b), numbers);
    EXPECT_EQ(c.numel(), 0);
    EXPECT_EQ(a.scalar_type(), at::kLong);
    EXPECT_EQ(b.scalar_type(), at::kInt);
    return std::pair(a.const_data_ptr(), b.const_data_ptr());
  };
  step(100);
  const auto settled = step(100);
  const int64_t moves = memory.moves();
  for (const int64_t count : {1, 64, 100, 128}) EXPECT_EQ(step(count), settled);
  step(0);  // an empty tensor has no address
  EXPECT_EQ(step(5), settled);
  EXPECT_EQ(memory.moves(), moves);
  step(1000);  // outgrown
  EXPECT_GT(memory.moves(), moves);
  const auto grown = step(1000);
  EXPECT_EQ(step(3), grown);
}

TEST(TableMemory, RefusesNumbersThatDoNotFit) {
  TableMemory memory(at::kCPU);
  memory.begin();
  const std::vector<int64_t> large = {int64_t{1} << 31};
  EXPECT_THROW(memory.place({"a", 0}, large, at::kInt), Error);
  EXPECT_THROW(memory.place({"a", 0}, large, at::kFloat), Error);
  EXPECT_EQ(numbers_of(memory.place({"a", 0}, large, at::kLong)), large);
}

}  // namespace
}  // namespace hadal::ops
