#pragma once

// Eight elements at a time between memory and FP32 registers: 16-byte accesses where pointers
// allow.

#include <cuda_bf16.h>

#include <cstdint>

#include "base/dtype.h"
#include "kernels/detail/raise.h"

namespace dsv3::kernels::cuda::detail {

inline constexpr int kVector = 8;

__host__ __device__ inline bool aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ void load8(const float* x, float (&v)[kVector]) {
  const float4 low = *reinterpret_cast<const float4*>(x);
  const float4 high = *reinterpret_cast<const float4*>(x + 4);
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
  v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

__device__ __forceinline__ void load8(const __nv_bfloat16* x, float (&v)[kVector]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(x);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(words[i] << 16);
    v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void store8(float* x, const float (&v)[kVector]) {
  *reinterpret_cast<float4*>(x) = make_float4(v[0], v[1], v[2], v[3]);
  *reinterpret_cast<float4*>(x + 4) = make_float4(v[4], v[5], v[6], v[7]);
}

__device__ __forceinline__ void store8(__nv_bfloat16* x, const float (&v)[kVector]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  *reinterpret_cast<uint4*>(x) = make_uint4(words[0], words[1], words[2], words[3]);
}

/// kVec elements (8, or 1 where alignment forbids) between memory and FP32 registers.
template <int kVec, typename T>
__device__ __forceinline__ void load_n(const T* x, float (&v)[kVec]) {
  if constexpr (kVec == kVector) {
    load8(x, v);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = to_float(x[i]);
  }
}
template <int kVec, typename T>
__device__ __forceinline__ void store_n(T* x, const float (&v)[kVec]) {
  if constexpr (kVec == kVector) {
    store8(x, v);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = from_float<T>(v[i]);
  }
}

/// Calls fn with a null pointer of the CUDA type of `dtype`: dispatch_float("permute", p.dtype,
/// [&](auto* type) {…}).
template <typename Fn>
void dispatch_float(const char* name, DType dtype, Fn&& fn) {
  if (dtype == DType::kF32) {
    fn(static_cast<float*>(nullptr));
  } else if (dtype == DType::kBF16) {
    fn(static_cast<__nv_bfloat16*>(nullptr));
  } else {
    kernels::detail::raise_dtype(name, dtype);
  }
}

}  // namespace dsv3::kernels::cuda::detail
