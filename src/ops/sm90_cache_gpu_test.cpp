// Ops that read the caches, on a GPU.
#include "testing/sm90_cache_cases.h"

namespace hadal::ops {
namespace {

at::Device card() { return at::kCUDA; }

INSTANTIATE_TEST_SUITE_P(Cases, Sm90Attention, kAttentionCases);

}  // namespace
}  // namespace hadal::ops
