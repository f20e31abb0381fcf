#pragma once

#include <tuple>

#include "ops/quantize.h"
#include "ops/weight.h"

namespace dsv3::ops {

/// A result that products read in FP8. `y` carries the gradient, which passes the rounding to FP8
/// by as if it were not there; it has y's values where they were asked for, and else only its shape
/// and dtype (all strides 0, values undefined).
struct NormFp8 {
  at::Tensor y;       // [T, D]
  Fp8RowTiles tiles;  // of y as rounded to its dtype: the bits of quantize_rows(rms_norm(x))
};

/// y = rms_norm(x) (ops/rms_norm.h) in 1×128 FP8 tiles, in one pass over memory.
NormFp8 rms_norm_fp8(const at::Tensor& x, const Weight& weight, double eps,
                     const QuantizeOptions& options, bool keep_y = false);

/// sum = x + residual; y = rms_norm(sum) in FP8. Returns {sum, y}.
std::tuple<at::Tensor, NormFp8> add_rms_norm_fp8(const at::Tensor& x, const at::Tensor& residual,
                                                 const Weight& weight, double eps,
                                                 const QuantizeOptions& options,
                                                 bool keep_y = false);

}  // namespace dsv3::ops
