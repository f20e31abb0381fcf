#pragma once

// FP8 tiles of rows, where nothing is transposed.

#include "kernels/detail/fp8_tile.cuh"

namespace dsv3::kernels::cuda::detail {

/// A small block has two rows of eight tiles, half a warp a tile: longer runs of memory than a
/// square of 128×128. Note: on an H200 blocks of 16 KB instead of 4 are 2 to 3 % slower.
struct Strip {
  static constexpr int kThreads = 128, kTiles = kThreads / 16, kRows = 2;
  TilePlace place;
  int64_t tile;

  __device__ __forceinline__ Strip(int64_t rows, int64_t width) {
    const auto across = static_cast<unsigned>((width + kTiles * kTile - 1) / (kTiles * kTile));
    tile = int64_t{blockIdx.x % across} * kTiles + threadIdx.x / 16;
    const int64_t row0 = int64_t{blockIdx.x / across} * kRows;
    place = {.row0 = row0,
             .column0 = tile * kTile,
             .rows = tile * kTile < width ? static_cast<int>(min(rows - row0, int64_t{kRows})) : 0,
             .width = width};
  }
  /// Rows of this thread that exist.
  __device__ __forceinline__ int rows() const { return place.columns_left() > 0 ? place.rows : 0; }
};

/// Blocks of a matrix of such strips.
inline unsigned strip_grid(const char* name, int64_t rows, int64_t width) {
  constexpr int64_t kWidth = int64_t{Strip::kTiles} * kTile;
  const int64_t blocks = (rows + Strip::kRows - 1) / Strip::kRows * ((width + kWidth - 1) / kWidth);
  if (blocks > INT32_MAX) kernels::detail::raise_invalid(name, "more than 2^31 blocks of 2×1024");
  return static_cast<unsigned>(blocks);
}

}  // namespace dsv3::kernels::cuda::detail
