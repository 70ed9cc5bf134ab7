#include "ops/cache/lazy_memory.h"

#include <cstdint>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/memory.h"

namespace hadal::ops {
namespace {

TEST(LazyMemory, IsZeroAlignedAndTakenWhenWritten) {
  constexpr int64_t kRows = int64_t{1} << 20, kColumns = 256;  // 1 GiB
  const int64_t before = resident_bytes();
  at::Tensor memory = lazy_zeros(kRows, kColumns, at::kFloat);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory.const_data_ptr()) % 64, 0u);
  EXPECT_EQ(memory.sizes(), (at::IntArrayRef{kRows, kColumns}));
  EXPECT_EQ(memory[kRows - 1].abs().max().item<float>(), 0.0f);
  memory.narrow(0, 5, 16).fill_(1.0);
  EXPECT_LT(resident_bytes() - before, int64_t{64} << 20);
  EXPECT_EQ(memory[20][kColumns - 1].item<float>(), 1.0f);
  EXPECT_EQ(memory[21][0].item<float>(), 0.0f);
}

TEST(LazyMemory, SaysThatThereIsNoRoom) {
  EXPECT_THROW(lazy_zeros(int64_t{1} << 40, int64_t{1} << 20, at::kByte), Error);
}

}  // namespace
}  // namespace hadal::ops
