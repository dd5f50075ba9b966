// The Hopper (sm_90a) vocabulary that kernels are written in: a small wrapper per instruction, each with its meaning.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace cs336::hopper {

// ---- addresses, registers, barriers between threads ----

// The 32-bit shared-memory address that PTX wants.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// True in one lane of the (converged) warp.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected;
}

// A value that all lanes of the warp have anyway, so that the compiler knows it and keeps it in a uniform register.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Gives registers back to the block's pool; all warps of a warpgroup together.
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Takes registers from the block's pool, waiting for them; all warps of a warpgroup together.
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Named barrier: waits until `threads` threads have arrived, those that wait included.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Named barrier: arrives without waiting.
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- mbarriers: barriers in shared memory that count arrivals and bytes; a phase ends when both are complete ----

// Prepares a barrier whose phases take `arrivals` arrivals (and all the bytes announced to them).
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine: by the initialising thread, once, before a __syncthreads.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives once.
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives once and announces `bytes` that copies will bring.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of the given parity is over; a fresh barrier counts as past a phase of parity 1.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- blocks of a cluster ----

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// The address of what lies in this place of another block's shared memory.
__device__ __forceinline__ uint32_t address_in(uint32_t rank, const void* p) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}

// Arrives once at the same barrier of another block.
__device__ __forceinline__ void barrier_arrive_in(uint32_t rank, const uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address_in(rank, barrier))
               : "memory");
}

// barrier_wait where other blocks arrive: what they wrote before is then visible.
__device__ __forceinline__ void barrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Four floats of another block, by the address there.
__device__ __forceinline__ float4 load_in(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// ---- the copy engine (TMA); one thread issues a copy for all ----

// Fetches a tensor map into the descriptor cache.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Global to shared: the box at coordinates (c0, ..., c4), innermost first; its bytes are counted on `barrier`.
__device__ __forceinline__ void copy_in(const CUtensorMap* map, void* to, uint64_t* barrier, int c0, int c1, int c2,
                                        int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6,%7}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Shared to global: the box at coordinates (c0, ..., c4), without what lies outside the tensor.
__device__ __forceinline__ void copy_out(const CUtensorMap* map, const void* from, int c0, int c1, int c2, int c3,
                                         int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2,%3,%4,%5,%6}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}

// Global to shared: `bytes` in a row (a multiple of 16), counted on `barrier`.
__device__ __forceinline__ void bulk_in(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Shared to global: `bytes` in a row.
__device__ __forceinline__ void bulk_out(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
}

// Adds `bytes` of floats in shared memory to as many in global memory.
__device__ __forceinline__ void bulk_add(float* to, const float* from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}

// Closes the group of copies out of shared memory that this thread has issued.
__device__ __forceinline__ void commit_out() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups still read shared memory.
template <int kPending = 0>
__device__ __forceinline__ void wait_out_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until at most kPending of this thread's groups still write global memory.
template <int kPending = 0>
__device__ __forceinline__ void wait_out() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Makes this thread's ordinary writes to shared memory visible to the copy engine and to wgmma.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- small arithmetic ----

// 2^x, results below the normal range flushed to zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to two units in the last place.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to a pair of T, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The pair of T as floats, low half first.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  else
    return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// Stores four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8; r[m] is this
// lane's pair of matrix m.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// The same with each matrix transposed: lane l gives the address of the row that column l % 8 becomes.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- wgmma: one warpgroup (128 threads) computes D[64 x N] (+)= A[64 x 16] B[16 x N], asynchronously ----
//
// Thread t of the warpgroup (warp w = t / 32, lane l = t % 32) holds in d[4 j + 2 i + c] the element
//     row 16 w + l / 4 + 8 i,   column 8 j + 2 (l % 4) + c       (i, c in {0, 1}; j in [0, N / 8)).
// A in registers has the same layout in pairs, so D of one product becomes A of the next without a shuffle.

// Orders earlier accesses to registers and shared memory by this warpgroup before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of wgmma issued since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Tells the compiler that d changes here: reads of d do not move up across this point.
template <int N>
__device__ __forceinline__ void changes_here(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Waits until at most kPending committed groups are still running; d, which is then complete, may be read.
template <int kPending, int N>
__device__ __forceinline__ void wgmma_wait(float (&d)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  changes_here(d);
}

// Describes a tile stored as rows of 128 bytes under the 128-byte swizzle, its start aligned to 1024 bytes. Groups of 8
// rows follow each other; `panel` is the distance in bytes between one panel of 64 columns and the next, and is read
// only where the rows of the tile run along K (kRows below).
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile, uint32_t panel) {
  constexpr uint32_t kGroup = 1024;
  return uint64_t((shared_address(tile) & 0x3ffff) >> 4) | uint64_t(panel >> 4) << 16 | uint64_t(kGroup >> 4) << 32 |
         uint64_t(1) << 62;
}

// What to add to a descriptor to move by so many bytes.
__host__ __device__ constexpr int descriptor_step(int bytes) { return bytes / 16; }

// The same descriptor, hidden from the compiler, which would else keep all that is added to it in registers.
__device__ __forceinline__ uint64_t opaque(uint64_t descriptor) {
  uint32_t low = static_cast<uint32_t>(descriptor);
  asm volatile("" : "+r"(low));
  return descriptor >> 32 << 32 | low;
}

// How B lies in shared memory: as N rows along K, or as K rows along N.
enum class Along { kColumns, kRows };

// Wgmma<T, N>: ss takes A from shared memory (64 rows along K), rs from registers. _set computes D = A B, which frees
// the registers of D before; _add computes D += A B.
template <typename T, int N>
struct Wgmma;

#define CS336_F8(c, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define CS336_F16(c, i) CS336_F8(c, i), CS336_F8(c, i + 8)
#define CS336_F32(c, i) CS336_F16(c, i), CS336_F16(c, i + 16)
#define CS336_F64(c, i) CS336_F32(c, i), CS336_F32(c, i + 32)
#define CS336_D32(c) CS336_F16(c, 0)
#define CS336_D64(c) CS336_F32(c, 0)
#define CS336_D80(c) CS336_F32(c, 0), CS336_F8(c, 32)
#define CS336_D96(c) CS336_F32(c, 0), CS336_F16(c, 32)
#define CS336_D128(c) CS336_F64(c, 0)
#define CS336_D192(c) CS336_F64(c, 0), CS336_F32(c, 64)
#define CS336_D256(c) CS336_F64(c, 0), CS336_F64(c, 64)

#define CS336_R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define CS336_R32 CS336_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define CS336_R40 CS336_R32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define CS336_R48 CS336_R40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define CS336_R64 CS336_R48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define CS336_R96                                                                                    \
  CS336_R64                                                                                          \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87" \
  ",%88,%89,%90,%91,%92,%93,%94,%95"
#define CS336_R128                                                                                   \
  CS336_R96                                                                                          \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115" \
  ",%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// The instruction for one type: A and B from shared memory (operands i0, i1), and A from registers (i0 ... i3, B i4).
#define CS336_WGMMA_SS(N, R, TYPE, ACCUMULATE, c, i0, i1, i2)                                              \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " ACCUMULATE                                                 \
               ", 0;\n"                                                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" R "}, %" #i0 ", %" #i1 \
               ", p, 1, 1, 0, %" #i2 ";}"                                                                  \
               : CS336_D##N(c)                                                                             \
               : "l"(a), "l"(b), "n"(kB == Along::kRows))
#define CS336_WGMMA_RS(N, R, TYPE, ACCUMULATE, c, i0, i1, i2, i3, i4, i5)                                           \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " ACCUMULATE                                                          \
               ", 0;\n"                                                                                             \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" R "}, {%" #i0 ",%" #i1 ",%" #i2 \
               ",%" #i3 "}, %" #i4 ", p, 1, 1, %" #i5 ";}"                                                          \
               : CS336_D##N(c)                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kB == Along::kRows))

#define CS336_WGMMA(N, R, i0, i1, i2, i3, i4, i5)                                                          \
  template <typename T>                                                                                    \
  struct Wgmma<T, N> {                                                                                     \
    static constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;                                        \
    template <Along kB>                                                                                    \
    static __device__ __forceinline__ void ss_set(float (&d)[N / 2], uint64_t a, uint64_t b) {             \
      if constexpr (kBf16)                                                                                 \
        CS336_WGMMA_SS(N, R, "bf16", "0", "=f", i0, i1, i2);                                               \
      else                                                                                                 \
        CS336_WGMMA_SS(N, R, "f16", "0", "=f", i0, i1, i2);                                                \
    }                                                                                                      \
    template <Along kB>                                                                                    \
    static __device__ __forceinline__ void ss_add(float (&d)[N / 2], uint64_t a, uint64_t b) {             \
      if constexpr (kBf16)                                                                                 \
        CS336_WGMMA_SS(N, R, "bf16", "1", "+f", i0, i1, i2);                                               \
      else                                                                                                 \
        CS336_WGMMA_SS(N, R, "f16", "1", "+f", i0, i1, i2);                                                \
    }                                                                                                      \
    template <Along kB>                                                                                    \
    static __device__ __forceinline__ void rs_set(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) { \
      if constexpr (kBf16)                                                                                 \
        CS336_WGMMA_RS(N, R, "bf16", "0", "=f", i0, i1, i2, i3, i4, i5);                                   \
      else                                                                                                 \
        CS336_WGMMA_RS(N, R, "f16", "0", "=f", i0, i1, i2, i3, i4, i5);                                    \
    }                                                                                                      \
    template <Along kB>                                                                                    \
    static __device__ __forceinline__ void rs_add(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) { \
      if constexpr (kBf16)                                                                                 \
        CS336_WGMMA_RS(N, R, "bf16", "1", "+f", i0, i1, i2, i3, i4, i5);                                   \
      else                                                                                                 \
        CS336_WGMMA_RS(N, R, "f16", "1", "+f", i0, i1, i2, i3, i4, i5);                                    \
    }                                                                                                      \
  };

CS336_WGMMA(32, CS336_R16, 16, 17, 18, 19, 20, 21)
CS336_WGMMA(64, CS336_R32, 32, 33, 34, 35, 36, 37)
CS336_WGMMA(80, CS336_R40, 40, 41, 42, 43, 44, 45)
CS336_WGMMA(96, CS336_R48, 48, 49, 50, 51, 52, 53)
CS336_WGMMA(128, CS336_R64, 64, 65, 66, 67, 68, 69)
CS336_WGMMA(192, CS336_R96, 96, 97, 98, 99, 100, 101)
CS336_WGMMA(256, CS336_R128, 128, 129, 130, 131, 132, 133)

#undef CS336_F8
#undef CS336_F16
#undef CS336_F32
#undef CS336_F64
#undef CS336_D32
#undef CS336_D64
#undef CS336_D80
#undef CS336_D96
#undef CS336_D128
#undef CS336_D192
#undef CS336_D256
#undef CS336_R16
#undef CS336_R32
#undef CS336_R40
#undef CS336_R48
#undef CS336_R64
#undef CS336_R96
#undef CS336_R128
#undef CS336_WGMMA_SS
#undef CS336_WGMMA_RS
#undef CS336_WGMMA

}  // namespace cs336::hopper
