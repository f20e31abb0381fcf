// Builds without CUDA: every tensor is the host's.
#include <ATen/core/Tensor.h>

#include "base/error.h"
#include "ops/dispatch.h"

namespace dsv3::ops {

Stream stream_of(const at::Tensor& tensor) {
  if (tensor.is_cuda())
    throw CudaError("a tensor is on CUDA, but this program was built without it");
  require(tensor.is_cpu(), "a tensor is on {}: operators run on cpu and cuda",
          tensor.device().str());
  return Stream::host();
}

}  // namespace dsv3::ops
