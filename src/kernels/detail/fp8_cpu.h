#pragma once

// FP8 tiles on the host. The bodies (fp8_cpu.cpp) are compiled for themselves, because a product
// must be rounded before anything is added to it (e4m3.h), which slows others down.

#include "kernels/detail/cpu.h"
#include "kernels/detail/streaming.h"
#include "kernels/quantize.h"

namespace dsv3::kernels::cpu::detail {

/// A tile waits in the dtype that it is rounded to.
template <typename T>
using Fp8TileRow = T[kFp8Tile];

/// What is asked for while a tile is encoded, which takes as long as its memory does: a tile's
/// share of the next tiles to the right, in pieces of 1 KB of a row. The 256 bytes that a row of
/// one tile has come at half the memory's speed.
struct NextRows {
  static constexpr int64_t kSteps = kFp8Tile, kPiece = 1024, kLine = 64;

  const char* first = nullptr;
  int64_t stride = 0, lines = 0;  // bytes; at each step

  /// Before tile `tile` of `across` in rows of `stride` elements from `rows` on.
  template <typename T>
  DSV3_INLINE static NextRows of(const T* rows, int64_t stride, int64_t tile, int64_t across) {
    constexpr int64_t kSize = sizeof(T), kTiles = kPiece / (kFp8Tile * kSize);
    const int64_t next = (tile / kTiles + 1) * kTiles;
    const int64_t share = tile % kTiles * (kFp8Tile / kTiles);
    const T* const piece = next < across ? rows + next * kFp8Tile : rows + kFp8Tile * stride;
    return {reinterpret_cast<const char*>(piece + share * stride), stride * kSize,
            kFp8Tile / kTiles * kPiece / kLine / kSteps};
  }
  DSV3_INLINE void ask(int64_t step) const {
    for (int64_t i = step * lines; i < (step + 1) * lines; ++i) {
      constexpr int64_t kLines = kPiece / kLine;
      __builtin_prefetch(first + i / kLines * stride + i % kLines * kLine, 0, kSecondLevel);
    }
  }
};

/// Where a tile stands in a matrix of `width` columns.
struct Fp8Place {
  int64_t row0, column0, width;
  bool streamed;  // results go past the caches
  NextRows next = {};
};

/// One row's codes and scales, tile j's scale at scales[j · scale_stride].
void encode_row_tiles(const float* x, int64_t size, const ScaleRule& rule, uint8_t* codes,
                      float* scales, int64_t scale_stride);
void encode_row_tiles(const BFloat16* x, int64_t size, const ScaleRule& rule, uint8_t* codes,
                      float* scales, int64_t scale_stride);

/// The first `rows` rows of a tile.
void emit_rows(const Fp8TileRow<float>* tile, const Fp8Rows& out, const ScaleRule& rule,
               const Fp8Place& at, int64_t rows);
void emit_rows(const Fp8TileRow<BFloat16>* tile, const Fp8Rows& out, const ScaleRule& rule,
               const Fp8Place& at, int64_t rows);

/// The whole tile, zeros where no token exists, transposed, into a matrix of `padded` tokens.
void emit_columns(const Fp8TileRow<float>* tile, const Fp8Columns& out, const ScaleRule& rule,
                  const Fp8Place& at, int64_t padded);
void emit_columns(const Fp8TileRow<BFloat16>* tile, const Fp8Columns& out, const ScaleRule& rule,
                  const Fp8Place& at, int64_t padded);

/// One 128×128 block, `rows` by `columns` of it with rows `stride` apart: its codes into a matrix
/// of `width` columns; returns its scale.
float encode_block(const float* x, int64_t stride, int64_t rows, int64_t columns,
                   const ScaleRule& rule, uint8_t* codes, int64_t width);
float encode_block(const BFloat16* x, int64_t stride, int64_t rows, int64_t columns,
                   const ScaleRule& rule, uint8_t* codes, int64_t width);

}  // namespace dsv3::kernels::cpu::detail
