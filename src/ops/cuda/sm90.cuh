// Hopper's asynchronous machinery as far as hadal's kernels use it: mbarriers, bulk copies to
// shared memory, clusters, and the warpgroup matrix instructions. Device code for sm_90a only.
//
// The rounding of the matrix instructions, and the tree that products keep, are
// docs/decisions/0010-product-trees.md; ops/gemm/hopper_twin.h computes the same bits on a CPU.
#pragma once

#include <cstdint>

namespace hadal::ops::cuda {

/// Threads of a warpgroup, and rows of its matrix instruction.
inline constexpr int kWarpgroup = 128;
inline constexpr int kWgmmaRows = 64;

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- mbarriers: a phase ends when all arrivals and all announced bytes are there

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)),
               "r"(arrivals));
}
/// Makes initialised barriers visible to the copy engine and to the cluster.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)),
      "r"(bytes)
      : "memory");
}
/// Waits until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(smem_address(barrier)),
      "r"(parity)
      : "memory");
}

/// The same where other blocks of the cluster arrive.
__device__ __forceinline__ void barrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1, 0x989680;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(smem_address(barrier)),
      "r"(parity)
      : "memory");
}

/// Copies `bytes` (a multiple of 16; both addresses too) and reports them to the barrier.
__device__ __forceinline__ void bulk_copy(void* dst,
                                          const void* src,
                                          uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem_address(dst)),
      "l"(src), "r"(bytes), "r"(smem_address(barrier))
      : "memory");
}

// --- clusters

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// All threads of all blocks of the cluster meet; what they wrote to shared memory is then visible.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
/// The address in another block's shared memory of what lies at `local` in ours.
__device__ __forceinline__ uint32_t remote_address(const void* local, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(smem_address(local)), "r"(rank));
  return there;
}
__device__ __forceinline__ void store_remote(uint32_t address, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
/// Arrives at a barrier of another block; what this thread wrote, to its memory or elsewhere, is
/// seen by who waits there with barrier_wait_cluster.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t address) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address)
               : "memory");
}

/// A float of another block's shared memory, at the address it has in ours.
__device__ __forceinline__ float load_remote(const float* local, uint32_t rank) {
  float value;
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [there];\n}"
      : "=f"(value)
      : "r"(smem_address(local)), "r"(rank)
      : "memory");
  return value;
}

// --- within a block

/// What plain stores of this thread wrote to shared memory is seen by the matrix instructions of
/// threads that meet it at a barrier afterwards.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/// Named barriers 1 to 15 of `threads` threads: all wait, or some only announce themselves.
__device__ __forceinline__ void named_barrier_wait(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
/// Registers of each thread of the warpgroup from here on.
template <int kCount>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --- dependent launches: the next kernel may start, and a kernel may wait for the one before

__device__ __forceinline__ void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_previous() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

/// Has a constant brought to the second-level cache, where who waits for the kernel before finds
/// it.
__device__ __forceinline__ void prefetch_constant(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

// --- matrix instructions

/// Descriptor of an operand in rows of 128 bytes whose 16-byte pieces are swizzled (piece c of row
/// r lies at c ^ (r % 8)): groups of 8 rows, 1,024 bytes each, one after the other. `address` may
/// point 32, 64 or 96 bytes into the first row to select a k step.
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupStride = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kGroupStride | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

/// Descriptor of an operand whose K runs along the rows: the same rows of 128 bytes, 64 BF16 values
/// of its other dimension each; the next 64 of them lie `stride` bytes behind. 16 rows on is the
/// next k step: 2,048 bytes.
__device__ __forceinline__ uint64_t transposed_descriptor(uint32_t address, uint32_t stride) {
  return (operand_descriptor(address) & ~(uint64_t{0x3fff} << 16)) | uint64_t{stride >> 4} << 16;
}

/// Registers were written (or last read) before the following matrix instructions.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving uses of accumulators across the matrix instructions.
template <int kCount>
__device__ __forceinline__ void keep(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define HADAL_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HADAL_D8(i) HADAL_D4(i), HADAL_D4(i + 4)
#define HADAL_D16(i) HADAL_D8(i), HADAL_D8(i + 8)
#define HADAL_D32(i) HADAL_D16(i), HADAL_D16(i + 16)
#define HADAL_D64(i) HADAL_D32(i), HADAL_D32(i + 32)
#define HADAL_D128(i) HADAL_D64(i), HADAL_D64(i + 64)
#define HADAL_L4 "%0,%1,%2,%3"
#define HADAL_L8 HADAL_L4 ",%4,%5,%6,%7"
#define HADAL_L16 HADAL_L8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define HADAL_L32 HADAL_L16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define HADAL_L64                                                                             \
  HADAL_L32                                                                                   \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53," \
  "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define HADAL_L128                                                                            \
  HADAL_L64                                                                                   \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85," \
  "%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,"    \
  "%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,"     \
  "%123,%124,%125,%126,%127"

/// d (+)= A B^T of 64 rows of A and kN rows of B, both K-major; the thread holds kN / 2 values:
/// d[4 j + 0, 1] = row warp * 16 + lane / 4, columns 8 j + 2 (lane % 4) + 0, 1; d[4 j + 2, 3] = the
/// same 8 rows below. add = 0 starts from zero. A comes from shared memory (a descriptor) or from
/// registers: a[0] and a[1] = rows lane / 4 and 8 below, 4 bytes from (lane % 4) * 4 of the step's
/// first 16 bytes; a[2] and a[3] = the same of its second 16 bytes.
template <int kN>
struct Wgmma;

// i0 to i5: the numbers of the operands behind the accumulators.
#define HADAL_WGMMA(kN, kHalf, kList, i0, i1, i2, i3, i4, i5)                                    \
  template <>                                                                                    \
  struct Wgmma<kN> {                                                                             \
    using Accumulators = float[kHalf];                                                           \
    static __device__ __forceinline__ void e4m3(float (&d)[kHalf],                               \
                                                uint64_t a,                                      \
                                                uint64_t b,                                      \
                                                int add) {                                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i2                                        \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k32.f32.e4m3.e4m3 {" kList "}, " i0  \
                   ", " i1 ", p, 1, 1;\n}"                                                       \
                   : HADAL_D##kHalf(0)                                                           \
                   : "l"(a), "l"(b), "r"(add));                                                  \
    }                                                                                            \
    static __device__ __forceinline__ void bf16(float (&d)[kHalf],                               \
                                                uint64_t a,                                      \
                                                uint64_t b,                                      \
                                                int add) {                                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i2                                        \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32.bf16.bf16 {" kList "}, " i0  \
                   ", " i1 ", p, 1, 1, 0, 0;\n}"                                                 \
                   : HADAL_D##kHalf(0)                                                           \
                   : "l"(a), "l"(b), "r"(add));                                                  \
    }                                                                                            \
    static __device__ __forceinline__ void e4m3(float (&d)[kHalf],                               \
                                                const uint32_t (&a)[4],                          \
                                                uint64_t b,                                      \
                                                int add) {                                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i5                                        \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k32.f32.e4m3.e4m3 {" kList "}, {" i0 \
                   "," i1 "," i2 "," i3 "}, " i4 ", p, 1, 1;\n}"                                 \
                   : HADAL_D##kHalf(0)                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));              \
    }                                                                                            \
    static __device__ __forceinline__ void bf16(float (&d)[kHalf],                               \
                                                const uint32_t (&a)[4],                          \
                                                uint64_t b,                                      \
                                                int add) {                                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i5                                        \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32.bf16.bf16 {" kList "}, {" i0 \
                   "," i1 "," i2 "," i3 "}, " i4 ", p, 1, 1, 0;\n}"                              \
                   : HADAL_D##kHalf(0)                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));              \
    }                                                                                            \
    /* b: a transposed_descriptor. */                                                            \
    static __device__ __forceinline__ void bf16_transposed(float (&d)[kHalf],                    \
                                                           const uint32_t (&a)[4],               \
                                                           uint64_t b,                           \
                                                           int add) {                            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i5                                        \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32.bf16.bf16 {" kList "}, {" i0 \
                   "," i1 "," i2 "," i3 "}, " i4 ", p, 1, 1, 1;\n}"                              \
                   : HADAL_D##kHalf(0)                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));              \
    }                                                                                            \
  };
HADAL_WGMMA(8, 4, HADAL_L4, "%4", "%5", "%6", "%7", "%8", "%9")
HADAL_WGMMA(16, 8, HADAL_L8, "%8", "%9", "%10", "%11", "%12", "%13")
HADAL_WGMMA(32, 16, HADAL_L16, "%16", "%17", "%18", "%19", "%20", "%21")
HADAL_WGMMA(64, 32, HADAL_L32, "%32", "%33", "%34", "%35", "%36", "%37")
HADAL_WGMMA(128, 64, HADAL_L64, "%64", "%65", "%66", "%67", "%68", "%69")
HADAL_WGMMA(256, 128, HADAL_L128, "%128", "%129", "%130", "%131", "%132", "%133")
#undef HADAL_WGMMA

}  // namespace hadal::ops::cuda
