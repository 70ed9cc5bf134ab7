// The Hopper kernels in a build without CUDA: ops call them for tensors on a GPU alone, which such
// a build never sees.
#ifndef HADAL_WITH_CUDA

#include "base/check.h"
#include "ops/attention/attn_lists_sm90.h"
#include "ops/attention/heads_sm90.h"
#include "ops/attention/sparse_attn_sm90.h"
#include "ops/cache/rows_sm90.h"
#include "ops/compressor/compress_sm90.h"
#include "ops/gemm/linear_sm90.h"
#include "ops/gemm/normalised_sm90.h"
#include "ops/gemm/pack_sm90.h"
#include "ops/indexer/index_bf16_sm90.h"
#include "ops/indexer/index_scores_sm90.h"
#include "ops/mhc/hyper_connection_sm90.h"
#include "ops/moe/gate_sm90.h"
#include "ops/moe/moe_sm90.h"
#include "ops/norm/rms_norm_sm90.h"
#include "ops/sampling/sample_sm90.h"

namespace hadal::ops {
namespace {

[[noreturn]] void absent() {
  throw Error("this build has no CUDA: configure with the cuda preset");
}

}  // namespace

void linear_fp8_sm90(const LinearSm90Params&, Stream, const Sm90Choice&) { absent(); }
void linear_bf16_sm90(const LinearSm90Params&, Stream, const Sm90Choice&) { absent(); }
void linear_fp8_sm90(const LinearSm90Params&, const Sm90Factor*, int, Stream) { absent(); }
void linear_bf16_sm90(const LinearSm90Params&, const Sm90Factor*, int, Stream) { absent(); }
void widened_sm90(const WidenedSm90Params&, Stream, const Sm90Choice&) { absent(); }
void experts_fp4_sm90(const ExpertsSm90Params&, Stream, const Sm90Choice&) { absent(); }
void experts_fp8_sm90(const ExpertsSm90Params&, Stream, const Sm90Choice&) { absent(); }
void experts_bf16_sm90(const ExpertsSm90Params&, Stream, const Sm90Choice&) { absent(); }
void quantise_operand_sm90(const QuantiseSm90Params&, Stream) { absent(); }
void bf16_operand_sm90(const Bf16OperandSm90Params&, Stream) { absent(); }
void pack_fp4_sm90(const PackFp4Sm90Params&, Stream) { absent(); }
void pack_operand_sm90(const PackOperandSm90Params&, Stream) { absent(); }
void pack_widened_sm90(const PackWidenedSm90Params&, Stream) { absent(); }
void pack_scales_sm90(const PackScalesSm90Params&, Stream) { absent(); }
void pad_groups_sm90(const PadGroupsSm90Params&, Stream) { absent(); }
void swiglu_sm90(const SwigluSm90Params&, Stream) { absent(); }
void route_sm90(const RouteSm90Params&, Stream) { absent(); }
void swiglu_quantise_sm90(const SwigluQuantiseSm90Params&, Stream) { absent(); }
void combine_sm90(const CombineSm90Params&, Stream) { absent(); }
void gate_sm90(const GateSm90Params&, Stream) { absent(); }
void gate_route_sm90(const GateRouteSm90Params&, Stream) { absent(); }
void rms_norm_sm90(const RmsNormSm90Params&, Stream) { absent(); }
void normalised_sm90(const NormalisedSm90Params&, Stream) { absent(); }
void hc_pre_sm90(const HcPreSm90Params&, Stream) { absent(); }
bool serves_hc_pre_norm_sm90(int64_t, int64_t) { absent(); }
void hc_comb_sm90(const HcCombSm90Params&, Stream) { absent(); }
void hc_pre_norm_sm90(const HcPreNormSm90Params&, Stream) { absent(); }
void hc_post_sm90(const HcPostSm90Params&, Stream) { absent(); }
void latent_rows_sm90(const LatentRowsSm90Params&, Stream) { absent(); }
void index_rows_sm90(const IndexRowsSm90Params&, Stream) { absent(); }
void compress_sm90(const CompressSm90Params&, Stream) { absent(); }
void keep_rows_sm90(const KeepRowsSm90Params&, Stream) { absent(); }
void head_rows_sm90(const HeadRowsSm90Params&, Stream) { absent(); }
void head_operand_sm90(const HeadOperandSm90Params&, Stream) { absent(); }
void index_scores_sm90(const IndexScoresSm90Params&, Stream) { absent(); }
void index_topk_sm90(const IndexTopkSm90Params&, Stream) { absent(); }
void index_scores_bf16_sm90(const IndexScoresBf16Sm90Params&, Stream) { absent(); }
void index_topk_f32_sm90(const IndexTopkF32Sm90Params&, Stream) { absent(); }
void attn_lists_sm90(const AttnListsSm90Params&, Stream) { absent(); }
void widen_latents_sm90(const WidenLatentsSm90Params&, Stream) { absent(); }
void sample_sm90(const SampleSm90Params&, Stream) { absent(); }
void log_probs_sm90(const LogProbsSm90Params&, Stream) { absent(); }
void sparse_attn_sm90(const SparseAttnSm90Params&, Stream, SparseAttnKernel) { absent(); }

}  // namespace hadal::ops

#endif
