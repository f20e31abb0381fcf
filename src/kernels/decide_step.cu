// The decision whether an optimizer step is taken: one thread, between the gradient norm and the
// update, so that no step waits for the host. A few dozen bytes.

#include "kernels/detail/decide_step.h"
#include "kernels/detail/launch.cuh"

namespace dsv3::kernels::cuda {
namespace {

__global__ void decide_step_kernel(DecideStep p) {
  kernels::detail::decide(p);
}

}  // namespace

void decide_step(const DecideStep& p, Stream stream) {
  decide_step_kernel<<<1, 1, 0, detail::cuda_stream(stream)>>>(p);
  detail::check_launch("decide_step");
}

}  // namespace dsv3::kernels::cuda
