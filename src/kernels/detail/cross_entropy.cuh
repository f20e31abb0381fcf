#pragma once

#include <cuda_runtime.h>

#include "kernels/loss.h"

namespace dsv3::kernels::cuda::detail {

/// cross_entropy with gradients, one read and one write of memory, by clusters of thread blocks.
/// False, and nothing done, where the device, the row's length or the pointer do not allow it.
bool cross_entropy_sm90(const CrossEntropy& p, cudaStream_t stream);

}  // namespace dsv3::kernels::cuda::detail
