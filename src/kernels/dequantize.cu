// Dequantisation on the device: a block of 128 threads per 2×1024 numbers, or of 256 per 128×128
// of the transposed form, all of its loads in flight before the first use (detail/fp8_tile.cuh).
// Bytes for BF16: T·K read, 2·T·K written.

#include "kernels/detail/fp8_strip.cuh"

namespace dsv3::kernels::cuda {
namespace {

using detail::kTile;
using detail::kTileBand;
using detail::kTileThreads;
using detail::TilePlace;
using detail::TileValues;

/// Up to `left` numbers of a row.
template <bool kVec, typename T>
__device__ __forceinline__ void store_row(T* y, const float (&v)[8], int64_t left) {
  if constexpr (kVec) {
    detail::Packed<T> packed;
    packed.set(v);
    if (left > 0) packed.store(y);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < left) y[e] = detail::from_float<T>(v[e]);
    }
  }
}

/// kRows and kBlocks.
template <typename T, bool kVec>
__global__ void __launch_bounds__(detail::Strip::kThreads) dequantize_kernel(Dequantize p) {
  constexpr int kRows = detail::Strip::kRows;
  const detail::Strip strip(p.num_tokens, p.width);
  const int rows = strip.rows();
  const int64_t left = strip.place.columns_left(), row = strip.place.row0;
  const int64_t offset = row * p.width + strip.place.column0 + 8 * detail::tile_octet();
  TileValues<uint8_t, kRows> values;
  detail::load_share<kVec>(values, p.data + offset, p.width, rows, left);
  // Of row octet mod kRows.
  const int mine = detail::tile_octet() % kRows;
  const float* from = p.tiling == Fp8Tiling::kRows
                          ? p.scales + strip.tile * p.scale_stride + row + mine
                          : p.scales + strip.place.row0 / kTile * p.scale_stride + strip.tile;
  const float scale = mine < strip.place.rows ? *from : 0.0f;
  values.share_scales(scale);
  T* y = static_cast<T*>(p.y) + offset;
#pragma unroll
  for (int j = 0; j < kRows; ++j, y += p.width) {
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = values.at(j, e);
    store_row<kVec>(y, v, j < rows ? left : 0);
  }
}

/// kColumns: the way of emit_columns backwards.
template <typename T, bool kVec>
__global__ void __launch_bounds__(kTileThreads)
    dequantize_columns_kernel(Dequantize p, unsigned across) {
  __shared__ uint4 codes[kTile][8];
  const int64_t row0 = int64_t{blockIdx.x / across} * kTile;
  const TilePlace place{
      .row0 = row0,
      .column0 = int64_t{blockIdx.x % across} * kTile,
      .rows = static_cast<int>(min(p.num_tokens - row0, int64_t{kTile})),
      .width = p.width,
  };
  const int lane = threadIdx.x % detail::kWarp, warp = threadIdx.x / detail::kWarp;
#pragma unroll
  for (int i = 0; i < kTile * 8 / kTileThreads; ++i) {
    const int octet = lane / 8 + 4 * i, column = 8 * octet + warp, pair = lane % 8;
    uint4 part = make_uint4(0, 0, 0, 0);
    if (place.column0 + column < p.width) {
      const uint8_t* from = p.data + (place.column0 + column) * p.data_stride + row0 + 16 * pair;
      part = *reinterpret_cast<const uint4*>(from);
    }
    if (octet % 2 != 0) part = make_uint4(part.z, part.w, part.x, part.y);
    codes[column][detail::swizzle(column, pair)] = part;
  }
  __syncthreads();
  const int octet = detail::tile_octet(), first = detail::tile_first_row();
  const int64_t left = place.columns_left();
  uint2 mine[8];
  float scales[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    mine[e] = reinterpret_cast<const uint2*>(codes[8 * octet + e])[first / 8 ^ octet];
    const int64_t column = place.column0 + 8 * octet + e;
    scales[e] = e < left ? p.scales[row0 / kTile * p.scale_stride + column] : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < kTileBand; ++j) {
    if (first + j >= place.rows) continue;
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = __fmul_rn(detail::decode(mine[e], j), scales[e]);
    store_row<kVec>(static_cast<T*>(p.y) + (row0 + first + j) * p.width + place.column0 + 8 * octet,
                    v, left);
  }
}

}  // namespace

void dequantize(const Dequantize& p, Stream stream) {
  if (p.num_tokens == 0 || p.width == 0) return;
  const unsigned grid = detail::tile_grid("dequantize", p.num_tokens, p.width),
                 across = detail::tiles_of(p.width);
  const unsigned strips = detail::strip_grid("dequantize", p.num_tokens, p.width);
  const cudaStream_t on = detail::cuda_stream(stream);
  const bool columns = p.tiling == Fp8Tiling::kColumns;
  const bool vec = p.width % 8 == 0 && detail::aligned16(p.data) && detail::aligned16(p.y);
  detail::dispatch_float("dequantize", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (columns && vec) {
      dequantize_columns_kernel<T, true><<<grid, kTileThreads, 0, on>>>(p, across);
    } else if (columns) {
      dequantize_columns_kernel<T, false><<<grid, kTileThreads, 0, on>>>(p, across);
    } else if (vec) {
      dequantize_kernel<T, true><<<strips, detail::Strip::kThreads, 0, on>>>(p);
    } else {
      dequantize_kernel<T, false><<<strips, detail::Strip::kThreads, 0, on>>>(p);
    }
  });
  detail::check_launch("dequantize");
}

}  // namespace dsv3::kernels::cuda
