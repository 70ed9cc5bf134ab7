// Products by the twins on a CPU that stands for a card: operands, tiles and experts' runs in the
// layouts of the kernels, against the integer model on plain matrices, bit for bit.
#include "testing/sm90_products_cases.h"

namespace hadal::ops {
namespace {

at::Device card() { return at::kCPU; }

INSTANTIATE_TEST_SUITE_P(Rows, Sm90Products, ::testing::Values(1, 7, 130));

}  // namespace
}  // namespace hadal::ops
