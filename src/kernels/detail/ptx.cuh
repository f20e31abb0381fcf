#pragma once

// Instructions that CUDA C++ has no word for, one per function (PTX ISA 8.x). Those of sm_90 trap
// elsewhere: their callers launch them on that architecture only.

#include <cstdint>

namespace dsv3::kernels::cuda::detail::ptx {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define DSV3_SM90(...) __trap()
#else
#define DSV3_SM90(...) asm volatile(__VA_ARGS__)
#endif

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// threadIdx.x, read anew instead of being kept in a register.
__device__ __forceinline__ uint32_t thread_index() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

/// 2^x, flushing denormals; about 2 ulp.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x; about 1 ulp.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 16 bytes, or zeros without reading where they do not exist.
__device__ __forceinline__ uint4 load_if(const void* x, bool exists) {
  uint4 v = make_uint4(0, 0, 0, 0);
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.s32 p, %5, 0;\n"
      "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(x), "r"(static_cast<int>(exists)));
  return v;
}
/// Asks the L2 cache for a line that is read soon.
__device__ __forceinline__ void prefetch(const void* x) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(x));
}
/// Stores where `wanted`, without a branch around what makes the value.
__device__ __forceinline__ void store_if(void* x, const uint2& v, bool wanted) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.s32 p, %3, 0;\n"
      "@p st.global.v2.u32 [%0], {%1, %2};\n"
      "}\n" ::"l"(x),
      "r"(v.x), "r"(v.y), "r"(static_cast<int>(wanted))
      : "memory");
}
__device__ __forceinline__ void store_if(void* x, const uint4& v, bool wanted) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.s32 p, %5, 0;\n"
      "@p st.global.v4.u32 [%0], {%1, %2, %3, %4};\n"
      "}\n" ::"l"(x),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<int>(wanted))
      : "memory");
}

/// The larger of each half of two pairs of BF16; a number where one of them is NaN.
__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

/// The larger magnitude of each half of two pairs of BF16, with any sign; a number where one of
/// them is NaN.
__device__ __forceinline__ uint32_t max_abs_bf16x2(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 860
  return max_bf16x2(a & 0x7fff7fffu, b & 0x7fff7fffu);
#else
  uint32_t y;
  asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
#endif
}

/// Waits until `threads` threads of the block, a multiple of 32, have come to barrier `id`, 1 … 15.
__device__ __forceinline__ void group_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Two kernels of which the second begins while the first ends (launch_second): nothing before
// sm_90.

/// In the first: the second may be launched once all blocks have come here or ended.
__device__ __forceinline__ void let_second_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/// In the second: returns when the first has ended and what it wrote is seen.
__device__ __forceinline__ void wait_for_first() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Clusters of thread blocks.

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
  DSV3_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// Announces this thread at the cluster's barrier; what it wrote before is seen behind
/// cluster_wait.
__device__ __forceinline__ void cluster_arrive() {
  DSV3_SM90("barrier.cluster.arrive.release;" ::: "memory");
}
/// Waits until all threads of the cluster have announced themselves.
__device__ __forceinline__ void cluster_wait() {
  DSV3_SM90("barrier.cluster.wait.acquire;" ::: "memory");
}

/// The address, in block `rank` of the cluster, of what stands at `address` in one's own shared
/// memory.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t mapped = 0;
  DSV3_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
/// Stores to another block's shared memory without waiting, and counts the 16 bytes at that block's
/// barrier; both addresses are cluster_address's.
__device__ __forceinline__ void store_cluster(uint32_t address, uint4 v, uint32_t barrier) {
  DSV3_SM90(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
      : "memory");
}

// A thread's own copies from device to shared memory (sm_80), which it alone may read once they are
// waited for.

/// 16 bytes, both sides aligned to as much; past the first-level cache.
__device__ __forceinline__ void async_copy16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
/// The same, or zeros without reading `global` where it does not exist.
__device__ __forceinline__ void async_copy16_or_zeros(uint32_t shared, const void* global,
                                                      bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(exists ? 16 : 0)
               : "memory");
}
/// Closes the thread's open group of copies, which may be empty.
__device__ __forceinline__ void async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until all but the latest `kPending` groups have arrived.
template <int kPending>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Bulk copies between device and shared memory, 16-byte aligned, a multiple of 16 bytes.

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  DSV3_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
            : "memory");
}
/// Makes barrier_init known to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  DSV3_SM90("fence.mbarrier_init.release.cluster;" ::: "memory");
}
/// Arrives, and lets the phase wait for `bytes` more.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  DSV3_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
            "r"(bytes)
            : "memory");
}
/// Whether the phase of this parity is over; waits a while before it says no.
__device__ __forceinline__ bool barrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t over = 0;
  DSV3_SM90(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return over != 0;
}
/// The same where other blocks of the cluster stored (store_cluster) what is read then.
__device__ __forceinline__ bool barrier_try_wait_cluster(uint64_t* barrier, uint32_t parity) {
  uint32_t over = 0;
  DSV3_SM90(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return over != 0;
}
/// Device → shared; counts its bytes at the barrier.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  DSV3_SM90(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
/// Shared → device, in the thread's open group of copies.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
  DSV3_SM90("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
            "r"(shared_address(shared)), "r"(bytes)
            : "memory");
}
__device__ __forceinline__ void bulk_commit() {
  DSV3_SM90("cp.async.bulk.commit_group;" ::: "memory");
}
/// Waits until all but the latest `kPending` groups have read their shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  DSV3_SM90("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
/// Waits until all groups are complete.
__device__ __forceinline__ void bulk_wait_all() {
  DSV3_SM90("cp.async.bulk.wait_group 0;" ::: "memory");
}
/// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine.
__device__ __forceinline__ void fence_async_shared() {
  DSV3_SM90("fence.proxy.async.shared::cta;" ::: "memory");
}

#undef DSV3_SM90

}  // namespace dsv3::kernels::cuda::detail::ptx
