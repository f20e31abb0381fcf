#pragma once

#include "ops/quantize.h"

namespace dsv3::ops {

/// Which results leave in FP8, and whether they leave in their own dtype too.
struct SwigluFp8Options {
  QuantizeOptions quantize;
  bool rows = true;     // 1×128 tiles: for the next product
  bool columns = true;  // 128×1 tiles, transposed: for the weight's gradient
  bool keep = false;    // in gate_up's dtype
};

/// y = swiglu(gate_up) or weighted_swiglu(gate_up, row_weight) (ops/swiglu.h) in FP8, reading
/// gate_up once; the bits of quantising their result. y carries the gradient past the rounding to
/// FP8; without `keep` it has no values (as NormFp8::y).
struct SwigluFp8 {
  at::Tensor y;            // [T, I]
  Fp8RowTiles rows;        // of y [T, I]
  Fp8ColumnTiles columns;  // of y: data [I, Tp]
};
SwigluFp8 swiglu_fp8(const at::Tensor& gate_up, const at::Tensor& row_weight,
                     const SwigluFp8Options& options);

/// What backward of swiglu_fp8 can hand to an FP8 product: the gradients in FP8, reading dy and
/// gate_up once. For a product's backward to call; records nothing. An intermediate size that is
/// not a multiple of 128 takes two passes.
struct SwigluGradientFp8 {
  at::Tensor dgate_up;     // [T, 2I], undefined without `keep`
  at::Tensor drow_weight;  // [T], undefined without row_weight
  Fp8RowTiles rows;        // of dgate_up [T, 2I]
  Fp8ColumnTiles columns;  // of dgate_up: data [2I, Tp]
};
SwigluGradientFp8 swiglu_gradient_fp8(const at::Tensor& dy, const at::Tensor& gate_up,
                                      const at::Tensor& row_weight,
                                      const SwigluFp8Options& options);

}  // namespace dsv3::ops
