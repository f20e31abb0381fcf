// The CUDA side of `dsv3 verify`.
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include "cli/machine.h"

namespace dsv3::cli {
namespace {

/// CUDA writes 13.0 as 13000, 12.8 as 12080.
std::string version_text(int version) {
  return version == 0 ? "" : fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

/// From the library that LibTorch loads; empty when it is not there.
std::string nccl_version() {
  void* library = dlopen("libnccl.so.2", RTLD_LAZY);
  if (library == nullptr) return "";
  using GetVersion = int (*)(int*);
  const auto get_version = reinterpret_cast<GetVersion>(dlsym(library, "ncclGetVersion"));
  int version = 0;
  const bool known = get_version != nullptr && get_version(&version) == 0;
  dlclose(library);
  if (!known) return "";
  return fmt::format("{}.{}.{}", version / 10000, version % 10000 / 100, version % 100);
}

std::string cudnn_version() {
  if (!at::globalContext().hasCuDNN()) return "";
  const int64_t version = at::detail::getCUDAHooks().versionCuDNN();
  return fmt::format("{}.{}.{}", version / 10000, version % 10000 / 100, version % 100);
}

}  // namespace

CudaFacts cuda_facts() {
  CudaFacts facts;
  facts.driver_present = nvidia_driver_present();
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  facts.driver_version = version_text(driver);
  facts.runtime_version = version_text(runtime);
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    facts.why_off = facts.driver_present
                        ? fmt::format("the driver refuses: {}", cudaGetErrorString(status))
                        : "no NVIDIA driver is loaded on this machine";
    return facts;
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    facts.gpus.push_back({.name = properties.name,
                          .compute_major = properties.major,
                          .compute_minor = properties.minor,
                          .memory_gib = static_cast<double>(properties.totalGlobalMem) /
                                        (1024.0 * 1024.0 * 1024.0)});
  }
  facts.cudnn_version = cudnn_version();
  facts.nccl_version = nccl_version();
  return facts;
}

}  // namespace dsv3::cli
