#pragma once

// FP8 tiles on the host. The bodies (fp8_cpu.cpp) are compiled for themselves, because a product
// must be rounded before anything is added to it (e4m3.h), which slows others down.

#include "kernels/detail/cpu.h"
#include "kernels/quantize.h"

namespace dsv3::kernels::cpu::detail {

using Fp8TileRow = float[kFp8Tile];

/// One row's codes and scales, tile j's scale at scales[j · scale_stride].
void encode_row_tiles(const float* x, int64_t size, const ScaleRule& rule, uint8_t* codes,
                      float* scales, int64_t scale_stride);

/// The first `rows` rows of the tile at (row0, column0) into a matrix of `width` columns.
void emit_rows(const Fp8TileRow* tile, const Fp8Rows& out, const ScaleRule& rule, int64_t row0,
               int64_t rows, int64_t column0, int64_t width);

/// The whole tile at (row0, column0), zeros where no token exists, transposed, into a matrix of
/// `padded` tokens.
void emit_columns(const Fp8TileRow* tile, const Fp8Columns& out, const ScaleRule& rule,
                  int64_t row0, int64_t padded, int64_t column0, int64_t width);

/// One 128×128 block, `rows` by `columns` of it: its codes into a matrix of `width` columns;
/// returns its scale.
float encode_block(const Fp8TileRow* tile, int64_t rows, int64_t columns, const ScaleRule& rule,
                   uint8_t* codes, int64_t width);

}  // namespace dsv3::kernels::cpu::detail
