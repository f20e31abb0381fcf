#pragma once

// FP8 tiles of a row that a group of threads holds in registers: vector i of thread `lane` is the
// eight columns from 8·(lane + i·kGroup), so that 16 neighbouring lanes hold one tile of 128 for
// each i, an even number of them. The tiles' maxima go through the shuffles in pairs, and each lane
// works out the scale of one tile only: a division costs as much as the rest of a vector's work.

#include "kernels/detail/fp8_tile.cuh"
#include "kernels/detail/ptx.cuh"

namespace dsv3::kernels::cuda::detail {

/// The largest magnitude of tile t % kVectors (of the half warp's), t the thread. All lanes of a
/// warp call it together, zeros standing for what does not exist.
template <int kVectors>
__device__ __forceinline__ float own_tile_amax(const Packed<float> (&y)[kVectors]) {
  float own = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float amax = 0.0f;
#pragma unroll
    for (int e = 0; e < kVector; ++e) amax = fmaxf(amax, fabsf(y[i].at(e)));
    amax = half_warp_max(amax);
    if (threadIdx.x % kVectors == i) own = amax;
  }
  return own;
}

template <int kVectors>
__device__ __forceinline__ float own_tile_amax(const Packed<__nv_bfloat16> (&y)[kVectors]) {
  constexpr int kPairs = kVectors / 2;
  uint32_t most[kVectors];  // of even and of odd columns
#pragma unroll
  for (int i = 0; i < kVectors; ++i) most[i] = y[i].most();
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t even = __byte_perm(most[2 * i], most[2 * i + 1], 0x5410);
    const uint32_t odd = __byte_perm(most[2 * i], most[2 * i + 1], 0x7632);
    uint32_t pair = ptx::max_abs_bf16x2(even, odd) & 0x7fff7fffu;  // a tile in each half
#pragma unroll
    for (int mask = 8; mask > 0; mask /= 2) {
      pair = ptx::max_bf16x2(pair, __shfl_xor_sync(kFullMask, pair, mask));
    }
    if (threadIdx.x / 2 % kPairs == i) own = pair;
  }
  return __uint_as_float(threadIdx.x % 2 == 0 ? own << 16 : own & 0xffff0000u);
}

/// Writes row `row` of `out` [T, hidden] and its scales. kGroup threads hold the row, a multiple
/// of 16; `vectors` = hidden / 8, 0 for a row that does not exist. All lanes of a warp come
/// together.
template <int kGroup, typename T, int kVectors>
__device__ __forceinline__ void write_row(const Fp8Rows& out, const ScaleRule& rule,
                                          const Packed<T> (&y)[kVectors], int64_t row,
                                          int64_t hidden, int lane, int vectors) {
  const auto own = tile_scale(own_tile_amax(y), rule);
  const int first = (lane / 16 * 16) + threadIdx.x % kVectors * kGroup;  // of the own tile
  if (threadIdx.x % 16 < kVectors && first < vectors) {
    out.scales[first / 16 * out.scale_stride + row] = own.scale;
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const float inverse = __shfl_sync(kFullMask, own.inverse, i, 16);
    const int c = lane + i * kGroup;
    if (c >= vectors) continue;
    const uint2 codes = encode8([&](int e) { return y[i].at(e); }, inverse);
    *reinterpret_cast<uint2*>(out.data + row * hidden + c * kVector) = codes;
  }
}

}  // namespace dsv3::kernels::cuda::detail
