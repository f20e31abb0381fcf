#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/stream.h"

namespace dsv3::kernels {

// Products over experts where LibTorch has none on the device: its grouped kernel takes BF16 with
// sizes that are multiples of 8 only. CUDA alone: on the host a loop over experts serves
// (ops/linear.cpp). Sums in FP32 (FP64 for kF64) in a fixed order; the offsets stay on the device.

/// y[r] = x[r] · w[e] for the rows offsets[e-1] … offsets[e] (0 before the first) of each expert;
/// rows behind the last offset are not touched.
struct GroupedProduct {
  int64_t num_rows;     // T'
  int32_t num_experts;  // E < 65536
  int64_t in_size;      // K
  int64_t out_size;     // N
  DType dtype;          // of x, w and y: kF32, kBF16 or kF64
  const void* x;        // [T', K]
  const void* w;        // [E, K, N] with the strides below, in elements
  int64_t w_expert_stride, w_in_stride, w_out_stride;
  const int32_t* offsets;  // [E] inclusive ends, ascending, at most T'
  void* y;                 // [T', N]
};

/// grad[e] += dy_eᵀ · x_e over the same rows; an expert without rows is left as it is.
struct GroupedWeightGrad {
  int64_t num_rows;        // T'
  int32_t num_experts;     // E < 65536
  int64_t in_size;         // K
  int64_t out_size;        // N
  DType dtype;             // of dy and x: kF32, kBF16 or kF64
  DType grad_dtype;        // dtype; or kF32 where that is kBF16
  const void* dy;          // [T', N]
  const void* x;           // [T', K]
  const int32_t* offsets;  // [E] as above
  void* grad;              // [E, N, K]
};

namespace cuda {
void grouped_product(const GroupedProduct& p, Stream stream);
void grouped_weight_grad(const GroupedWeightGrad& p, Stream stream);
}  // namespace cuda

}  // namespace dsv3::kernels
