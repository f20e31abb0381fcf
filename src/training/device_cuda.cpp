// Builds with CUDA.
#include <cuda_runtime_api.h>

#include "base/error.h"
#include "training/device.h"

namespace dsv3::cuda {

bool built_in() {
  return true;
}

std::string gpu_name(int index) {
  cudaDeviceProp properties{};
  const auto status = cudaGetDeviceProperties(&properties, index);
  if (status != cudaSuccess)
    throw CudaError(fmt::format("cudaGetDeviceProperties: {}", cudaGetErrorString(status)));
  return properties.name;
}

}  // namespace dsv3::cuda
