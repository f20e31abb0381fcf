#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "bench/ops/case.h"
#include "kernels/quantize.h"

namespace dsv3::bench {

/// Room for the FP8 forms of a [T, K] matrix; the Setup owns it.
kernels::Fp8Rows fp8_rows(Setup& setup, int64_t num_tokens, int64_t width);
kernels::Fp8Columns fp8_columns(Setup& setup, int64_t num_tokens, int64_t width);
/// The scales that the operators choose when they are not told.
kernels::ScaleRule default_rule();

/// FP8 tiles as LibTorch's operators make them: codes E4M3 and the scale of each tile.
struct ComposedTiles {
  at::Tensor codes, scales;
};

/// 1×128 tiles of x [T, K]; the last tile of a row is padded.
ComposedTiles composed_rows(const at::Tensor& x);
/// 128×1 tiles, transposed.
ComposedTiles composed_columns(const at::Tensor& x);
/// 128×128 blocks of x [N, K], both multiples of 128.
ComposedTiles composed_blocks(const at::Tensor& x);
/// code · scale of 1×128 tiles, in `dtype`.
at::Tensor composed_dequantize(const ComposedTiles& tiles, at::ScalarType dtype);

/// FP32 scales of 1×128 tiles of a [T, K] matrix, in bytes.
int64_t scale_bytes(int64_t rows, int64_t width);
/// Next multiple of 128.
int64_t padded_rows(int64_t rows);

}  // namespace dsv3::bench
