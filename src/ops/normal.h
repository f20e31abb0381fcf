#pragma once

#include <cstdint>

#include "base/tensor_fwd.h"

namespace dsv3::ops {

/// Fills `out` (contiguous, FP32, BF16 or FP64) with mean + std · N(0, 1). Number i depends on
/// (seed, stream, i) only, and is the same on every device to within rounding (Philox4x32-10,
/// kernels/optimizer.h normal_fill).
void fill_normal(at::Tensor& out, double mean, double std, uint64_t seed, uint64_t stream);

}  // namespace dsv3::ops
