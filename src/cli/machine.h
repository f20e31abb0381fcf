#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dsv3::cli {

/// What Linux tells about the host.
struct CpuFacts {
  std::string model;      // "AMD EPYC …"
  int64_t num_cores = 0;  // that this process may use
  double memory_gib = 0;  // of the machine
  bool avx2 = false;
  bool avx512 = false;
  bool avx512_bf16 = false;  // BF16 dot products
  bool amx_bf16 = false;     // BF16 tile products
};
CpuFacts cpu_facts();

struct GpuFacts {
  std::string name;
  int compute_major = 0, compute_minor = 0;
  double memory_gib = 0;
};

/// What the CUDA side has. In a build without CUDA only `why_off` and `driver_present` are filled.
struct CudaFacts {
  bool driver_present = false;  // the kernel module of an NVIDIA GPU is loaded
  std::string driver_version;   // newest CUDA that the driver runs, "13.0"
  std::string runtime_version;
  std::string cudnn_version;
  std::string nccl_version;
  std::vector<GpuFacts> gpus;
  std::string why_off;  // one clause; empty when at least one GPU can be used
};
CudaFacts cuda_facts();

/// Whether the NVIDIA kernel module runs here, with or without CUDA in this build.
bool nvidia_driver_present();

}  // namespace dsv3::cli
