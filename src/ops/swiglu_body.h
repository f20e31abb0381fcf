#pragma once

#include <ATen/core/Tensor.h>

#include "ops/fp8.h"

// The kernels' calls that SwiGLU's operators share (swiglu.cpp, swiglu_fp8.cpp). gate_up [T, 2I] is
// checked, contiguous and of a dtype with a kernel; row_weight [T] may be undefined.

namespace dsv3::ops {

/// Throws std::invalid_argument unless gate_up [T, 2I] and row_weight [T] (or none) belong
/// together.
void check_swiglu(const char* op, const at::Tensor& gate_up, const at::Tensor& row_weight);

/// FP8 forms that a kernel fills; null = not wanted.
struct Fp8Forms {
  kernels::ScaleRule rule = {};
  const Fp8RowTiles* rows = nullptr;
  const Fp8ColumnTiles* columns = nullptr;
};

/// y [T, I], undefined without `keep_y`.
at::Tensor run_swiglu(const at::Tensor& gate_up, const at::Tensor& row_weight,
                      const Fp8Forms& forms = {}, bool keep_y = true);

struct SwigluGrads {
  at::Tensor dgate_up;     // [T, 2I], undefined unless kept
  at::Tensor drow_weight;  // [T], undefined without a row weight
};
SwigluGrads run_swiglu_backward(const at::Tensor& dy, const at::Tensor& gate_up,
                                const at::Tensor& row_weight, const Fp8Forms& forms = {},
                                bool keep = true);

}  // namespace dsv3::ops
