// FP8 tiles on the host: maxima in lanes, codes by integer arithmetic on the floats' bits.
#include "kernels/detail/fp8_cpu.h"

#include "kernels/detail/e4m3.h"
#include "kernels/detail/lanes.h"

namespace dsv3::kernels::cpu::detail {
namespace {

/// max |x|; NaN is passed over.
DSV3_INLINE float amax_row(const float* x, int64_t size) {
  LaneFloats top = {}, v;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    load_lanes(x + i, v);
    v = v < 0.0f ? -v : v;
    top = v > top ? v : top;
  }
  float parts[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) parts[j] = top[j];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) {
      parts[j] = parts[j + half] > parts[j] ? parts[j + half] : parts[j];
    }
  }
  float largest = parts[0];
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

DSV3_INLINE void encode_tile(const float* x, int64_t size, const ScaleRule& rule, uint8_t* codes,
                             float* scale) {
  const auto pair = kernels::detail::tile_scale(amax_row(x, size), rule);
  *scale = pair.scale;
  encode_row(x, size, pair.inverse, codes);
}

constexpr int64_t kBytes = 16;
using Bytes [[gnu::vector_size(16)]] = uint8_t;

/// A 16×16 block of bytes at (r0, c0) transposed: four times, every row is interleaved with the one
/// 8 further on. The rows of `to` are `stride` apart; only the first `columns` are written.
DSV3_INLINE void transpose_bytes(const uint8_t (*from)[kFp8Tile], int64_t columns, uint8_t* to,
                                 int64_t stride) {
  Bytes rows[kBytes], next[kBytes];
  for (int64_t i = 0; i < kBytes; ++i) std::memcpy(&rows[i], from[i], kBytes);
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kBytes / 2; ++i) {
      const Bytes a = rows[i], b = rows[i + kBytes / 2];
      next[2 * i] =
          __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                                14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kBytes; ++i) rows[i] = next[i];
  }
  for (int64_t i = 0; i < columns; ++i) std::memcpy(to + i * stride, &rows[i], kBytes);
}

}  // namespace

DSV3_CLONES void encode_row_tiles(const float* x, int64_t size, const ScaleRule& rule,
                                  uint8_t* codes, float* scales, int64_t scale_stride) {
  for (int64_t first = 0; first < size; first += kFp8Tile, scales += scale_stride) {
    encode_tile(x + first, std::min(kFp8Tile, size - first), rule, codes + first, scales);
  }
}

DSV3_CLONES float encode_block(const Fp8TileRow* tile, int64_t rows, int64_t columns,
                               const ScaleRule& rule, uint8_t* codes, int64_t width) {
  float amax = 0.0f;
  for (int64_t r = 0; r < rows; ++r) amax = std::max(amax, amax_row(tile[r], columns));
  const auto scale = kernels::detail::tile_scale(amax, rule);
  for (int64_t r = 0; r < rows; ++r) encode_row(tile[r], columns, scale.inverse, codes + r * width);
  return scale.scale;
}

DSV3_CLONES void emit_rows(const Fp8TileRow* tile, const Fp8Rows& out, const ScaleRule& rule,
                           int64_t row0, int64_t rows, int64_t column0, int64_t width) {
  const int64_t columns = std::min(kFp8Tile, width - column0);
  float* scales = out.scales + column0 / kFp8Tile * out.scale_stride + row0;
  for (int64_t r = 0; r < rows; ++r) {
    encode_tile(tile[r], columns, rule, out.data + (row0 + r) * width + column0, &scales[r]);
  }
}

DSV3_CLONES void emit_columns(const Fp8TileRow* tile, const Fp8Columns& out, const ScaleRule& rule,
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
#pragma omp simd
  for (int64_t c = 0; c < kFp8Tile; ++c) {
    const auto scale = kernels::detail::tile_scale(amax[c], rule);
    amax[c] = scale.scale;
    inverse[c] = scale.inverse;
  }
  std::memcpy(out.scales + row0 / kFp8Tile * out.scale_stride + column0, amax,
              static_cast<size_t>(columns) * sizeof(float));
  for (int64_t r = 0; r < kFp8Tile; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < kFp8Tile; ++c) {
      codes[r][c] = static_cast<uint8_t>(kernels::detail::e4m3_code(tile[r][c] * inverse[c]));
    }
  }
  uint8_t* const to = out.data + column0 * padded + row0;
  for (int64_t c = 0; c < columns; c += kBytes) {
    for (int64_t r = 0; r < kFp8Tile; r += kBytes) {
      transpose_bytes(reinterpret_cast<const uint8_t(*)[kFp8Tile]>(&codes[r][c]),
                      std::min(kBytes, columns - c), to + c * padded + r, padded);
    }
  }
}

}  // namespace dsv3::kernels::cpu::detail
