#pragma once

// FP8 tiles on the device. A block holds 128×128 numbers in registers: thread (octet = t mod 16,
// band = t / 16) has 8 columns from 8·octet in kBand rows from kBand·band; 256 threads with 8 rows,
// or 512 with 4 where several inputs leave no registers for more. A row of the tile is 16
// neighbouring lanes, which reduce all their rows' maxima at once; its codes leave in 128-byte
// runs. A column's maximum goes through shared memory; its codes too, swizzled so that neither side
// has bank conflicts, and leave 16 bytes a thread in 128-byte runs along the tokens.

#include "kernels/detail/fp8_values.cuh"
#include "kernels/detail/launch.cuh"

namespace dsv3::kernels::cuda::detail {

inline constexpr int kTileThreads = 256;  // with kTileBand
inline constexpr int kTileWarps = kTileThreads / kWarp;
inline constexpr int kTile = static_cast<int>(kFp8Tile);

__device__ __forceinline__ int tile_octet() {
  return threadIdx.x % 16;
}
template <int kBand = kTileBand>
__device__ __forceinline__ int tile_first_row() {
  return static_cast<int>(threadIdx.x) / 16 * kBand;
}

/// The largest of 16 neighbouring lanes, to all of them.
__device__ __forceinline__ float half_warp_max(float x) {
#pragma unroll
  for (int mask = 8; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, mask));
  return x;
}

/// Reduces kCount (4 or 8) values of each of 16 neighbouring lanes, half of them leaving at every
/// step: lane i of the 16 gets value i / (16 / kCount). join(a, b) = join(b, a).
template <int kCount, typename Join>
__device__ __forceinline__ float half_warp_reduce(float (&v)[kCount], Join&& join) {
  constexpr int kLanes = 16 / kCount;  // of a value at the end
#pragma unroll
  for (int width = kCount / 2; width > 0; width /= 2) {
    const bool upper = (threadIdx.x & (kLanes * width)) != 0;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float kept = upper ? v[i + width] : v[i], given = upper ? v[i] : v[i + width];
      v[i] = join(kept, __shfl_xor_sync(kFullMask, given, kLanes * width));
    }
  }
  float all = v[0];
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    all = join(all, __shfl_xor_sync(kFullMask, all, mask));
  }
  return all;
}

/// Which part of a matrix a tile is.
struct TilePlace {
  int64_t row0, column0;  // of the output
  int rows;               // rows that exist, ≤ 128
  int64_t width;          // columns of the output

  /// Columns that exist from this thread's first on; ≤ 0 = none.
  __device__ __forceinline__ int64_t columns_left() const {
    return width - column0 - 8 * tile_octet();
  }
};

/// 1×128 tiles of the rows that exist.
template <bool kVec, typename Values>
__device__ __forceinline__ void emit_rows(const Values& values, const Fp8Rows& out,
                                          const ScaleRule& rule, const TilePlace& place) {
  constexpr int kBand = Values::kBand, kLanes = 16 / kBand;
  const int octet = tile_octet(), first = tile_first_row<kBand>();
  const int64_t left = place.columns_left();
  float amax[kBand];
#pragma unroll
  for (int j = 0; j < kBand; ++j) amax[j] = values.row(j).amax();
  // Of row octet / kLanes.
  const auto scale = kernels::detail::tile_scale(
      half_warp_reduce(amax, [](float a, float b) { return fmaxf(a, b); }), rule);
  if (octet % kLanes == 0 && first + octet / kLanes < place.rows) {
    const int64_t row = place.row0 + first + octet / kLanes;
    out.scales[place.column0 / kTile * out.scale_stride + row] = scale.scale;
  }
  uint8_t* const to = out.data + (place.row0 + first) * place.width + place.column0 + 8 * octet;
#pragma unroll
  for (int j = 0; j < kBand; ++j) {
    const float inverse = __shfl_sync(kFullMask, scale.inverse, kLanes * j, 16);
    if (first + j < place.rows) {
      const uint2 codes = encode8([&](int e) { return values.at(j, e); }, inverse);
      store_codes<kVec>(to + j * place.width, codes, left);
    }
  }
}

template <int kBand = kTileBand>
struct ColumnShared {
  static constexpr int kWarps = kTile / kBand / 2;
  alignas(16) float amax[kWarps][kTile];
  alignas(16) float inverse[kTile];
  uint4 codes[kTile][8];  // [column][16 tokens], swizzled: see swizzle()
};

/// Where the 16 tokens from 16·pair of a column stand; in odd octets their halves are swapped.
__device__ __forceinline__ int swizzle(int column, int pair) {
  return pair ^ (column / 16 % 8);
}

/// 128×1 tiles of all 128 rows, transposed; `padded` = tokens of the output. All threads of the
/// block call it; `shared` may be used again at once by another call.
template <typename Values>
__device__ __forceinline__ void emit_columns(Values& values, const Fp8Columns& out,
                                             const ScaleRule& rule, const TilePlace& place,
                                             int64_t padded, ColumnShared<Values::kBand>& shared) {
  constexpr int kBand = Values::kBand, kWarps = ColumnShared<kBand>::kWarps;
  const int octet = tile_octet(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  values.forget();
  typename Values::Row top;
  top.clear();
#pragma unroll
  for (int j = 0; j < kBand; ++j) top.raise(values.row(j));
  top.raise(top.from_lane(16));
  if (lane < 16) {
    float amax[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) amax[e] = top.at(e);
    store8(&shared.amax[warp][8 * octet], amax);
  }
  __syncthreads();
  if (threadIdx.x < kTile) {
    const int column = threadIdx.x;
    float top = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.amax[w][column]);
    const auto scale = kernels::detail::tile_scale(top, rule);
    shared.inverse[column] = scale.inverse;
    if (place.column0 + column < place.width) {
      out.scales[place.row0 / kTile * out.scale_stride + place.column0 + column] = scale.scale;
    }
  }
  __syncthreads();
  const int band = threadIdx.x / 16;
  values.forget();
  float inverse[8];
  load8(&shared.inverse[8 * octet], inverse);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int column = 8 * octet + e;
    // Note: 8-byte chunk i of the column stands at i ^ octet: the 16 lanes of a half warp write to
    // 16 different chunks of 128 bytes.
    if constexpr (kBand == 8) {
      const uint2 codes = encode8([&](int j) { return values.at(j, e); }, inverse[e]);
      reinterpret_cast<uint2*>(shared.codes[column])[band ^ octet] = codes;
    } else {
      static_assert(kBand == 4);
      const auto code = [&](int j) { return __fmul_rn(values.at(j, e), inverse[e]); };
      const uint32_t codes = encode4(code(0), code(1), code(2), code(3));
      reinterpret_cast<uint32_t*>(shared.codes[column])[band ^ (2 * octet)] = codes;
    }
  }
  __syncthreads();
#pragma unroll
  for (int n = warp; n < 4 * 8; n += kWarps) {
    const int from_octet = lane / 8 + n / 8 * 4, column = 8 * from_octet + n % 8, pair = lane % 8;
    uint4 codes = shared.codes[column][swizzle(column, pair)];
    if (from_octet % 2 != 0) codes = make_uint4(codes.z, codes.w, codes.x, codes.y);
    if (place.column0 + column < place.width) {
      uint8_t* to = out.data + (place.column0 + column) * padded + place.row0 + 16 * pair;
      *reinterpret_cast<uint4*>(to) = codes;
    }
  }
}

}  // namespace dsv3::kernels::cuda::detail
