// Ops that read the caches, on a CPU that stands for a card: lists, packed rows and scores by the
// twins' paths.
#include "testing/sm90_cache_cases.h"

namespace hadal::ops {
namespace {

at::Device card() { return at::kCPU; }

INSTANTIATE_TEST_SUITE_P(Cases, Sm90Attention, kAttentionCases);

}  // namespace
}  // namespace hadal::ops
