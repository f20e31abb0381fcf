// Builds with CUDA: the stream that LibTorch queues its own work on.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>

#include "base/error.h"
#include "ops/dispatch.h"

namespace dsv3::ops {

Stream stream_of(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) return Stream::host();
  return Stream::on_cuda(c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream());
}

}  // namespace dsv3::ops
