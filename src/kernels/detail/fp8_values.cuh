#pragma once

// The numbers of a tile's thread (detail/fp8_tile.cuh): from and to E4M3 codes, and as they came
// from memory.

#include <cuda_fp8.h>

#include "kernels/detail/e4m3.h"
#include "kernels/detail/packed.cuh"
#include "kernels/detail/vector.cuh"

namespace dsv3::kernels::cuda::detail {

inline constexpr int kTileBand = 8;  // rows of a thread in a block of 256

__device__ __forceinline__ uint32_t encode4(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
#else
  return kernels::detail::e4m3_code(a) | kernels::detail::e4m3_code(b) << 8 |
         kernels::detail::e4m3_code(c) << 16 | kernels::detail::e4m3_code(d) << 24;
#endif
}

/// Eight codes of value(0) … value(7), the first in the lowest byte. Note: __fmul_rn is never
/// joined with an addition.
template <typename Fn>
__device__ __forceinline__ uint2 encode8(Fn&& value, float inverse) {
  return make_uint2(encode4(__fmul_rn(value(0), inverse), __fmul_rn(value(1), inverse),
                            __fmul_rn(value(2), inverse), __fmul_rn(value(3), inverse)),
                    encode4(__fmul_rn(value(4), inverse), __fmul_rn(value(5), inverse),
                            __fmul_rn(value(6), inverse), __fmul_rn(value(7), inverse)));
}

/// The number of byte `index` (a constant) of a word of codes.
__device__ __forceinline__ float decode(uint32_t word, int index) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  const auto pair = static_cast<__nv_fp8x2_storage_t>(word >> (index / 2 * 16));
  const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
  return __half2float(__ushort_as_half(index % 2 == 0 ? halves.x : halves.y));
#else
  return kernels::detail::e4m3_value(word >> (8 * index) & 0xffu);
#endif
}
__device__ __forceinline__ float decode(const uint2& words, int index) {
  return decode(index < 4 ? words.x : words.y, index % 4);
}

/// Up to `count` codes to `out`: one 8-byte store with kVec, where all eight or none are wanted.
template <bool kVec>
__device__ __forceinline__ void store_codes(uint8_t* out, const uint2& codes, int64_t count) {
  if constexpr (kVec) {
    if (count > 0) *reinterpret_cast<uint2*>(out) = codes;
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < count) out[e] = static_cast<uint8_t>((e < 4 ? codes.x : codes.y) >> (8 * (e % 4)));
    }
  }
}

/// A thread's share of a tile as it came from memory; at(row, column) widens one number.
template <typename T, int kRows = kTileBand>
struct TileValues {
  static constexpr int kBand = kRows;
  Packed<T> rows[kBand];

  /// Row j from `x`, of which `count` elements exist (none: zeros).
  template <bool kVec>
  __device__ __forceinline__ void load(int j, const T* x, int64_t count) {
    if constexpr (kVec) {
      rows[j].load_if(x, count > 0);
    } else {
      float v[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = e < count ? to_float(x[e]) : 0.0f;
      rows[j].set(v);
    }
  }
  /// Row j as it stands in memory.
  __device__ __forceinline__ void take(int j, const uint4& words) {
    rows[j].raw = words;
  }
  __device__ __forceinline__ void set(int j, const float (&v)[8]) {
    rows[j].set(v);
  }
  /// See Packed.
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int j = 0; j < kBand; ++j) rows[j].forget();
  }
  __device__ __forceinline__ float at(int j, int e) const {
    return rows[j].at(e);
  }
  /// Row j, and one row in the form whose magnitudes are compared.
  using Row = Packed<T>;
  __device__ __forceinline__ const Row& row(int j) const {
    return rows[j];
  }
};

template <int kRows>
struct TileValues<uint8_t, kRows> {
  static constexpr int kBand = kRows;
  uint2 codes[kBand];
  float scale[kBand];

  template <bool kVec>
  __device__ __forceinline__ void load(int j, const uint8_t* x, int64_t count) {
    codes[j] = make_uint2(0, 0);
    if constexpr (kVec) {
      if (count > 0) codes[j] = *reinterpret_cast<const uint2*>(x);
    } else {
      uint32_t words[2] = {0, 0};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < count) words[e / 4] |= uint32_t{x[e]} << (8 * (e % 4));
      }
      codes[j] = make_uint2(words[0], words[1]);
    }
  }
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int j = 0; j < kBand; ++j) asm volatile("" : "+r"(codes[j].x), "+r"(codes[j].y));
  }
  /// `own` of each lane is the scale of row (lane mod kBand).
  __device__ __forceinline__ void share_scales(float own) {
#pragma unroll
    for (int j = 0; j < kBand; ++j) scale[j] = __shfl_sync(kFullMask, own, j, kBand);
  }
  __device__ __forceinline__ float at(int j, int e) const {
    return __fmul_rn(decode(codes[j], e), scale[j]);
  }
  using Row = Packed<float>;
  __device__ __forceinline__ Row row(int j) const {
    Row widened;
#pragma unroll
    for (int e = 0; e < 8; ++e) widened.v[e] = at(j, e);
    return widened;
  }
};

/// A thread's share of a tile, its first row at `x`: `rows` of it exist, and `columns` of a row.
template <bool kVec, typename T, int kBand>
__device__ __forceinline__ void load_share(TileValues<T, kBand>& values, const T* x, int64_t stride,
                                           int rows, int64_t columns) {
#pragma unroll
  for (int j = 0; j < kBand; ++j, x += stride) {
    values.template load<kVec>(j, x, j < rows ? columns : 0);
  }
}

}  // namespace dsv3::kernels::cuda::detail
