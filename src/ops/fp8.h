#pragma once

#include "kernels/quantize.h"
#include "ops/quantize.h"

// How FP8 tensors and options reach the kernels: for operators that quantise their output.

namespace dsv3::ops {

/// Throws std::invalid_argument where min_amax is out of range.
kernels::ScaleRule scale_rule(const QuantizeOptions& options, const char* op);

kernels::Fp8Rows rows_of(const Fp8RowTiles& tiles);
kernels::Fp8Columns columns_of(const Fp8ColumnTiles& tiles);

/// A tensor of these sizes and of dtype and device of `like` that holds one element only (all
/// strides 0, value undefined): what autograd hands the gradient to of a result that exists in FP8
/// alone.
at::Tensor gradient_carrier(at::IntArrayRef sizes, const at::Tensor& like);

}  // namespace dsv3::ops
