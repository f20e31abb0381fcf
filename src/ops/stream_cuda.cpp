// Builds with CUDA: the stream that LibTorch queues its own work on.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include "base/error.h"
#include "ops/dispatch.h"

namespace dsv3::ops {

Stream stream_of(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return Stream::host();
  require(tensor.is_cuda(), "a tensor is on {}: operators run on cpu and cuda",
          tensor.device().str());
  const auto device = tensor.device().index();
  require(device == c10::cuda::current_device(),
          "a tensor is on cuda:{}, but kernels are launched on the current device, cuda:{}", device,
          c10::cuda::current_device());
  return Stream::on_cuda(c10::cuda::getCurrentCUDAStream(device).stream());
}

}  // namespace dsv3::ops
