#pragma once

#include <ATen/core/Tensor.h>

#include "ops/fp8.h"
#include "ops/weight.h"

// The kernels' calls that RMSNorm's operators share (rms_norm.cpp, rms_norm_fp8.cpp). Inputs are
// checked, of a dtype with a kernel, and their rows contiguous.

namespace dsv3::ops {

/// Throws std::invalid_argument unless x [T, D] and weight [D] belong together.
void check_rms_norm(const char* op, const at::Tensor& x, const at::Tensor& weight);

struct NormInputs {
  at::Tensor x, residual, weight, second_weight;  // residual, second_weight may be undefined
  double eps;
  at::Tensor inv_rms = {};  // may be undefined; an earlier forward's, whose bits y then has again
};

/// What a forward makes; `sum` only with a residual, `second` only with its weight.
struct Normalised {
  at::Tensor sum, y, second, inv_rms;
};

/// `tiles`, with its rule, may be null; without `keep_y` only they hold y.
Normalised run_rms_norm(const NormInputs& inputs, const kernels::ScaleRule& rule = {},
                        const Fp8RowTiles* tiles = nullptr, bool keep_y = true);

struct NormGradients {
  at::Tensor dy, second_dy, dsum;  // may be undefined: dsum; second_dy without a second norm
};

/// dx, and the weights' gradients into their buckets. x is what was normalised; `second` null = one
/// norm.
at::Tensor run_rms_norm_backward(const NormGradients& grads, const at::Tensor& x,
                                 const at::Tensor& inv_rms, const Weight& weight,
                                 const Weight* second = nullptr);

}  // namespace dsv3::ops
