#pragma once

// FP8 tiles on the device. A block holds 128×128 numbers in registers: thread (octet = t mod 16,
// band = t / 16) has 8 columns from 8·octet in kBand rows from kBand·band; 256 threads with 8 rows,
// or 512 with 4 where several inputs leave no registers for more. A row of the tile is 16
// neighbouring lanes, which reduce all their rows' maxima at once; its codes leave in 128-byte
// runs. A column's maximum goes through shared memory; its codes too, swizzled so that neither side
// has bank conflicts, and leave 16 bytes a thread in 128-byte runs along the tokens.

#include "kernels/detail/fp8_values.cuh"
#include "kernels/detail/launch.cuh"
#include "kernels/detail/tile_scale.cuh"

namespace dsv3::kernels::cuda::detail {

inline constexpr int kTileThreads = 256;  // with kTileBand
inline constexpr int kTileWarps = kTileThreads / kWarp;
inline constexpr int kTile = static_cast<int>(kFp8Tile);

__device__ __forceinline__ int tile_octet() {
  return threadIdx.x % 16;
}
template <int kBand = kTileBand>
__device__ __forceinline__ int tile_first_row() {
  return static_cast<int>(ptx::thread_index()) / 16 * kBand;
}

/// The largest of 16 neighbouring lanes, to all of them.
__device__ __forceinline__ float half_warp_max(float x) {
#pragma unroll
  for (int mask = 8; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, mask));
  return x;
}

/// Reduces kCount values of each of 16 neighbouring lanes, half of them leaving at every step: lane
/// i of the 16 gets value i / (16 / kCount). join(a, b) = join(b, a).
template <int kCount, typename V, typename Join>
__device__ __forceinline__ V half_warp_reduce(V (&v)[kCount], Join&& join) {
  constexpr int kLanes = 16 / kCount;  // of a value at the end
#pragma unroll
  for (int width = kCount / 2; width > 0; width /= 2) {
    const bool upper = (threadIdx.x & (kLanes * width)) != 0;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const V kept = upper ? v[i + width] : v[i], given = upper ? v[i] : v[i + width];
      v[i] = join(kept, __shfl_xor_sync(kFullMask, given, kLanes * width));
    }
  }
  V all = v[0];
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    all = join(all, __shfl_xor_sync(kFullMask, all, mask));
  }
  return all;
}

/// The largest magnitude of row octet / (16 / kBand) of the thread's, over the tile's columns. All
/// lanes of a warp call it together.
template <typename Values>
__device__ __forceinline__ float row_amax(const Values& values) {
  constexpr int kBand = Values::kBand;
  float amax[kBand];
#pragma unroll
  for (int j = 0; j < kBand; ++j) amax[j] = values.row(j).amax();
  return half_warp_reduce(amax, [](float a, float b) { return fmaxf(a, b); });
}
/// Two rows go together, one in each half of a word.
template <int kBand>
__device__ __forceinline__ float row_amax(const TileValues<__nv_bfloat16, kBand>& values) {
  constexpr int kPairs = kBand / 2, kLanes = 16 / kPairs;  // lanes of a pair at the end
  uint32_t most[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t low = values.row(2 * i).most(), high = values.row(2 * i + 1).most();
    most[i] = ptx::max_abs_bf16x2(__byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632));
  }
  const uint32_t pair = half_warp_reduce(most, ptx::max_abs_bf16x2);
  const bool second = (threadIdx.x & (kLanes / 2)) != 0;
  return fabsf(__uint_as_float(second ? pair & 0xffff0000u : pair << 16));
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

/// 1×128 tiles of the rows that exist; the thread has those from `first` on.
template <bool kVec, typename Values>
__device__ __forceinline__ void emit_rows(Values& values, const Fp8Rows& out, const ScaleRule& rule,
                                          const TilePlace& place,
                                          int first = tile_first_row<Values::kBand>()) {
  constexpr int kBand = Values::kBand, kLanes = 16 / kBand;
  const int octet = tile_octet();
  const int64_t left = place.columns_left();
  const auto scale = tile_scale(row_amax(values), rule);  // of octet / kLanes
  if (octet % kLanes == 0 && first + octet / kLanes < place.rows) {
    const int64_t row = place.row0 + first + octet / kLanes;
    out.scales[place.column0 / kTile * out.scale_stride + row] = scale.scale;
  }
  values.forget();
  uint8_t* to = out.data + (place.row0 + first) * place.width + place.column0 + 8 * octet;
  const int rows = left > 0 ? place.rows - first : 0;  // of this thread's that exist
#pragma unroll
  for (int j = 0; j < kBand; ++j, to += place.width) {
    const float inverse = __shfl_sync(kFullMask, scale.inverse, kLanes * j, 16);
    const uint2 codes = encode8([&](int e) { return values.at(j, e); }, inverse);
    if constexpr (kVec) {
      ptx::store_if(to, codes, j < rows);
    } else {
      store_codes<false>(to, codes, j < rows ? left : 0);
    }
  }
}

struct ColumnShared {
  alignas(16) uint32_t amax[kTile];  // a magnitude's bits; all zero between two calls
  alignas(16) float inverse[kTile];
  uint4 codes[kTile][8];  // [column][16 tokens], swizzled: see swizzle()

  /// Before the first emit_columns: all threads of the block.
  __device__ __forceinline__ void prepare() {
    if (threadIdx.x < kTile) amax[threadIdx.x] = 0;
    __syncthreads();
  }
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
                                             int64_t padded, ColumnShared& shared) {
  constexpr int kBand = Values::kBand, kWarps = kTile / kBand / 2;
  const int octet = tile_octet(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  values.forget();
  typename Values::Row top;
  top.clear();
#pragma unroll
  for (int j = 0; j < kBand; ++j) top.raise(values.row(j));
  top.raise(top.from_lane(16));
#pragma unroll
  for (int e = 0; e < 4; ++e) {  // each half of the warp has four of the eight
    // NaN, where all are, becomes 0.
    const float amax = fmaxf(fabsf(lane < 16 ? top.at(e) : top.at(e + 4)), 0.0f);
    atomicMax(&shared.amax[8 * octet + lane / 16 * 4 + e], __float_as_uint(amax));
  }
  __syncthreads();
  if (threadIdx.x < kTile) {
    const int column = threadIdx.x;
    const auto scale = tile_scale(__uint_as_float(shared.amax[column]), rule);
    shared.amax[column] = 0;
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
  // Eight lanes take the 128 bytes of a column, a warp four columns that are eight apart.
  const int column = 8 * (lane / 8) + 32 * (warp / 8) + warp % 8, pair = lane % 8;
  const auto columns = static_cast<int>(min(place.width - place.column0, int64_t{kTile}));
  uint8_t* to = out.data + (place.column0 + column) * padded + place.row0 + 16 * pair;
#pragma unroll
  for (int c = 0; c < kTile; c += 4 * kWarps, to += 4 * kWarps * padded) {
    uint4 codes = shared.codes[column + c][swizzle(column + c, pair)];
    if (lane / 8 % 2 != 0) codes = make_uint4(codes.z, codes.w, codes.x, codes.y);
    ptx::store_if(to, codes, column + c < columns);
  }
}

inline unsigned tiles_of(int64_t size) {
  return static_cast<unsigned>((size + kTile - 1) / kTile);
}

/// Tiles of a matrix; throws when there are more than a grid holds.
inline unsigned tile_grid(const char* name, int64_t rows, int64_t width) {
  const int64_t tiles = int64_t{tiles_of(rows)} * tiles_of(width);
  if (tiles > INT32_MAX) kernels::detail::raise_invalid(name, "more than 2^31 tiles of 128×128");
  return static_cast<unsigned>(tiles);
}

}  // namespace dsv3::kernels::cuda::detail
