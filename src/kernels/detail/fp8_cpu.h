#pragma once

// FP8 tiles on the host: 128×128 numbers in FP32, zeros beyond the matrix, leave as 1×128 and 128×1
// tiles. Users are compiled with -ffp-contract=off (see e4m3.h).

#include "kernels/detail/cpu.h"
#include "kernels/detail/e4m3.h"
#include "kernels/detail/lanes.h"

namespace dsv3::kernels::cpu::detail {

using Fp8TileRow = float[kFp8Tile];

/// max |x|; NaN is passed over.
DSV3_INLINE float amax_row(const float* x, int64_t size) {
  LaneFloats top = {}, v;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    load_lanes(x + i, v);
    v = v < 0.0f ? -v : v;
    top = v > top ? v : top;
  }
  float largest = 0.0f;
  for (int64_t j = 0; j < kLanes; ++j) largest = top[j] > largest ? top[j] : largest;
  for (; i < size; ++i) {
    const float v1 = x[i] < 0.0f ? -x[i] : x[i];
    largest = v1 > largest ? v1 : largest;
  }
  return largest;
}

DSV3_INLINE void encode_row(const float* __restrict x, int64_t size, float inverse,
                            uint8_t* __restrict codes) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    codes[i] = static_cast<uint8_t>(kernels::detail::e4m3_code(x[i] * inverse));
  }
}

/// The first `rows` rows of the tile at (row0, column0) into a matrix of `width` columns.
DSV3_INLINE void emit_rows(const Fp8TileRow* tile, const Fp8Rows& out, const ScaleRule& rule,
                           int64_t row0, int64_t rows, int64_t column0, int64_t width) {
  const int64_t columns = std::min(kFp8Tile, width - column0);
  float* scales = out.scales + column0 / kFp8Tile * out.scale_stride + row0;
  for (int64_t r = 0; r < rows; ++r) {
    const auto scale = kernels::detail::tile_scale(amax_row(tile[r], columns), rule);
    scales[r] = scale.scale;
    encode_row(tile[r], columns, scale.inverse, out.data + (row0 + r) * width + column0);
  }
}

/// The whole tile at (row0, column0), transposed, into a matrix of `padded` columns.
DSV3_INLINE void emit_columns(const Fp8TileRow* tile, const Fp8Columns& out, const ScaleRule& rule,
                              int64_t row0, int64_t padded, int64_t column0, int64_t width) {
  alignas(64) float amax[kFp8Tile] = {}, inverse[kFp8Tile];
  alignas(64) uint8_t codes[kFp8Tile][kFp8Tile];
  for (int64_t r = 0; r < kFp8Tile; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < kFp8Tile; ++c) {
      const float v = tile[r][c] < 0.0f ? -tile[r][c] : tile[r][c];
      amax[c] = v > amax[c] ? v : amax[c];
    }
  }
  const int64_t columns = std::min(kFp8Tile, width - column0);
  float* scales = out.scales + row0 / kFp8Tile * out.scale_stride + column0;
  for (int64_t c = 0; c < kFp8Tile; ++c) {
    const auto scale = kernels::detail::tile_scale(amax[c], rule);
    inverse[c] = scale.inverse;
    if (c < columns) scales[c] = scale.scale;
  }
  for (int64_t r = 0; r < kFp8Tile; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < kFp8Tile; ++c) {
      codes[r][c] = static_cast<uint8_t>(kernels::detail::e4m3_code(tile[r][c] * inverse[c]));
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    uint8_t* __restrict column = out.data + (column0 + c) * padded + row0;
    for (int64_t r = 0; r < kFp8Tile; ++r) column[r] = codes[r][c];
  }
}

}  // namespace dsv3::kernels::cpu::detail
