#pragma once

// FP8 tiles of rows, where nothing is transposed.

#include "kernels/detail/fp8_tile.cuh"

namespace dsv3::kernels::cuda::detail {

/// A block of kTileThreads has eight rows of eight tiles, longer runs of memory than a square of
/// 128×128: a warp has a tile column, half of it four rows.
struct Strip {
  static constexpr int kRows = 8, kTiles = kTileWarps, kBand = 4;
  TilePlace place;
  int first;  // row of the thread
  int64_t tile;

  __device__ __forceinline__ Strip(int64_t rows, int64_t width) {
    const auto across = static_cast<unsigned>((width + kTiles * kTile - 1) / (kTiles * kTile));
    tile = int64_t{blockIdx.x % across} * kTiles + threadIdx.x / kWarp;
    first = static_cast<int>(threadIdx.x / 16 % 2) * kBand;
    const int64_t row0 = int64_t{blockIdx.x / across} * kRows;
    place = {.row0 = row0,
             .column0 = tile * kTile,
             .rows = static_cast<int>(min(rows - row0, int64_t{kRows})),
             .width = width};
  }
  /// Rows of this thread that exist: ≤ 0 = none, ≥ kBand = all.
  __device__ __forceinline__ int rows() const {
    return place.columns_left() > 0 ? place.rows - first : 0;
  }
};

/// Blocks of a matrix of such strips.
inline unsigned strip_grid(const char* name, int64_t rows, int64_t width) {
  constexpr int64_t kWidth = int64_t{Strip::kTiles} * kTile;
  const int64_t blocks = (rows + Strip::kRows - 1) / Strip::kRows * ((width + kWidth - 1) / kWidth);
  if (blocks > INT32_MAX) kernels::detail::raise_invalid(name, "more than 2^31 blocks of 8×1024");
  return static_cast<unsigned>(blocks);
}

}  // namespace dsv3::kernels::cuda::detail
