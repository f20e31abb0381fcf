#pragma once

// Eight numbers of a thread as they came from memory: BF16 stays packed, so that many loads can be
// in flight before the first use.

#include <cstdint>

#include "kernels/detail/launch.cuh"
#include "kernels/detail/ptx.cuh"
#include "kernels/detail/vector.cuh"

namespace dsv3::kernels::cuda::detail {

template <typename T>
struct Packed;

template <>
struct Packed<__nv_bfloat16> {
  uint4 raw;

  __device__ __forceinline__ void clear() { raw = make_uint4(0, 0, 0, 0); }
  /// What was widened before is widened again after, instead of being kept in registers.
  __device__ __forceinline__ void forget() {
    asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
  }
  /// Zeros where they do not exist.
  __device__ __forceinline__ void load_if(const __nv_bfloat16* x, bool exists) {
    raw = ptx::load_if(x, exists);
  }
  __device__ __forceinline__ void load(const __nv_bfloat16* x) {
    raw = *reinterpret_cast<const uint4*>(x);
  }
  /// From words that stand `stride` apart.
  __device__ __forceinline__ void load_words(const uint4* words, int) { raw = *words; }
  __device__ __forceinline__ void store(__nv_bfloat16* x) const {
    *reinterpret_cast<uint4*>(x) = raw;
  }
  __device__ __forceinline__ float at(int e) const {
    const uint32_t word = e < 4 ? (e < 2 ? raw.x : raw.y) : (e < 6 ? raw.z : raw.w);
    return __uint_as_float(e % 2 == 0 ? word << 16 : word & 0xffff0000u);
  }
  __device__ __forceinline__ void set(const float (&v)[kVector]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    raw = make_uint4(words[0], words[1], words[2], words[3]);
  }
  /// The larger magnitudes of this and `other`, with any sign, replace this. NaN is passed over.
  __device__ __forceinline__ void raise(const Packed& other) {
    raw.x = ptx::max_abs_bf16x2(raw.x, other.raw.x);
    raw.y = ptx::max_abs_bf16x2(raw.y, other.raw.y);
    raw.z = ptx::max_abs_bf16x2(raw.z, other.raw.z);
    raw.w = ptx::max_abs_bf16x2(raw.w, other.raw.w);
  }
  /// That of another lane of the warp.
  __device__ __forceinline__ Packed from_lane(int mask) const {
    Packed other;
    other.raw.x = __shfl_xor_sync(kFullMask, raw.x, mask);
    other.raw.y = __shfl_xor_sync(kFullMask, raw.y, mask);
    other.raw.z = __shfl_xor_sync(kFullMask, raw.z, mask);
    other.raw.w = __shfl_xor_sync(kFullMask, raw.w, mask);
    return other;
  }
  /// The largest magnitudes of even and of odd elements, with any sign; NaN only where all are.
  __device__ __forceinline__ uint32_t most() const {
    return ptx::max_abs_bf16x2(ptx::max_abs_bf16x2(raw.x, raw.y),
                               ptx::max_abs_bf16x2(raw.z, raw.w));
  }
  /// The largest magnitude; NaN only where all eight are.
  __device__ __forceinline__ float amax() const {
    const uint32_t both = most();
    return fmaxf(fabsf(__uint_as_float(both << 16)), fabsf(__uint_as_float(both & 0xffff0000u)));
  }
};

template <>
struct Packed<float> {
  float v[kVector];

  __device__ __forceinline__ void forget() {}
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int e = 0; e < kVector; ++e) v[e] = 0.0f;
  }
  __device__ __forceinline__ void load_if(const float* x, bool exists) {
    clear();
    if (exists) load(x);
  }
  __device__ __forceinline__ void load(const float* x) {
    load8(x, v);
  }
  __device__ __forceinline__ void load_words(const uint4* words, int stride) {
    const uint4 low = words[0], high = words[stride];
    v[0] = __uint_as_float(low.x), v[1] = __uint_as_float(low.y);
    v[2] = __uint_as_float(low.z), v[3] = __uint_as_float(low.w);
    v[4] = __uint_as_float(high.x), v[5] = __uint_as_float(high.y);
    v[6] = __uint_as_float(high.z), v[7] = __uint_as_float(high.w);
  }
  __device__ __forceinline__ void store(float* x) const {
    store8(x, v);
  }
  __device__ __forceinline__ float at(int e) const {
    return v[e];
  }
  __device__ __forceinline__ void set(const float (&values)[kVector]) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) v[e] = values[e];
  }
  __device__ __forceinline__ void raise(const Packed& other) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) v[e] = fmaxf(v[e], fabsf(other.v[e]));
  }
  __device__ __forceinline__ Packed from_lane(int mask) const {
    Packed other;
#pragma unroll
    for (int e = 0; e < kVector; ++e) other.v[e] = __shfl_xor_sync(kFullMask, v[e], mask);
    return other;
  }
  __device__ __forceinline__ float amax() const {
    float top = fabsf(v[0]);
#pragma unroll
    for (int e = 1; e < kVector; ++e) top = fmaxf(top, fabsf(v[e]));
    return top;
  }
};

}  // namespace dsv3::kernels::cuda::detail
