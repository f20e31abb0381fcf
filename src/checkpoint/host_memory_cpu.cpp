// Builds without CUDA.
#include <ATen/ops/empty.h>

#include "checkpoint/host_memory.h"

namespace dsv3::detail {

at::Tensor host_tensor(int64_t numel, at::ScalarType type, bool /*pinned*/) {
  return at::empty({numel}, at::TensorOptions(type));
}

}  // namespace dsv3::detail
