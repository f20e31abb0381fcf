#include "training/device.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <cstdlib>
#include <thread>

#include "base/error.h"
#include "monitor/hardware.h"

namespace dsv3 {

at::Device choose_device(const std::string& name) {
  require(name == "auto" || name == "cpu" || name == "cuda",
          "device: '{}', but it is auto, cpu or cuda", name);
  const bool present = cuda::built_in() && at::hasCUDA();
  if (name == "cpu" || (name == "auto" && !present)) return at::Device(at::kCPU);
  require(present, "device: cuda, but {}; device cpu or auto runs on the processor",
          cuda::built_in() ? "no GPU is seen here" : "this program was built without CUDA");
  return at::Device(at::kCUDA, 0);
}

std::string device_name(const at::Device& device) {
  return device.is_cuda() ? cuda::gpu_name(device.index()) : processor_name();
}

int64_t allocated_bytes(const at::Device& device) {
  if (!device.is_cuda()) return 0;
  const auto stats = c10::getDeviceAllocator(at::kCUDA)->getDeviceStats(device.index());
  return stats.allocated_bytes[0].peak;
}

void configure_process(int64_t num_threads, bool deterministic) {
  // LibTorch's own default knows OMP_NUM_THREADS, but takes the physical cores only.
  const auto cores = static_cast<int64_t>(std::max(1u, std::thread::hardware_concurrency()));
  if (num_threads > 0 || std::getenv("OMP_NUM_THREADS") == nullptr)
    at::set_num_threads(static_cast<int>(num_threads > 0 ? num_threads : cores));
  at::globalContext().setDeterministicAlgorithms(deterministic, /*warn_only=*/false);
  if (!deterministic) return;
  // cuBLAS reads this once, when its handle is made; without it LibTorch refuses to be
  // deterministic.
  ::setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/1);
  at::globalContext().setDeterministicFillUninitializedMemory(false);
}

}  // namespace dsv3
