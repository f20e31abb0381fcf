#pragma once

#include "base/stream.h"
#include "kernels/elementwise.h"

// The device's bodies that quantise SwiGLU's results (swiglu_fp8.cu), called by swiglu.cu.
namespace dsv3::kernels::cuda::detail {

void swiglu_forward_fp8(const SwigluForward& p, Stream stream);
void swiglu_backward_fp8(const SwigluBackward& p, Stream stream);

}  // namespace dsv3::kernels::cuda::detail
