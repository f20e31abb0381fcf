#pragma once

// FP8 tiles on the host. The bodies (fp8_cpu.cpp) are compiled for themselves, because a product
// must be rounded before anything is added to it (e4m3.h), which slows others down.

#include "kernels/detail/cpu.h"
#include "kernels/quantize.h"

namespace dsv3::kernels::cpu::detail {

/// A tile waits in the dtype that it is rounded to.
template <typename T>
using Fp8TileRow = T[kFp8Tile];

/// Where a tile stands in a matrix of `width` columns.
struct Fp8Place {
  int64_t row0, column0, width;
  bool streamed;  // results go past the caches
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
