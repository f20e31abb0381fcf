// Builds with CUDA.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <cuda_runtime_api.h>

#include "checkpoint/host_memory.h"

namespace dsv3::detail {

at::Tensor host_tensor(int64_t numel, at::ScalarType type, bool pinned) {
  const auto options = at::TensorOptions(type);
  void* memory = nullptr;
  const size_t bytes = static_cast<size_t>(numel) * c10::elementSize(type);
  if (!pinned || bytes == 0) return at::empty({numel}, options);
  if (::cudaHostAlloc(&memory, bytes, cudaHostAllocPortable) != cudaSuccess) {
    ::cudaGetLastError();  // the failure is dealt with here; nobody else must find it
    return at::empty({numel}, options);
  }
  return at::from_blob(
      memory, {numel}, [](void* block) { ::cudaFreeHost(block); }, options);
}

}  // namespace dsv3::detail
