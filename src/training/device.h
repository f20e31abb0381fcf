#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace dsv3 {

/// The device that training.device names: "cpu", "cuda", or "auto" (a GPU where there is one).
/// Throws std::invalid_argument when "cuda" is asked for and absent.
at::Device choose_device(const std::string& name);

/// Name of the GPU as its driver reports it, or of the processor.
std::string device_name(const at::Device& device);

/// Bytes of GPU memory that tensors hold now; 0 on the CPU.
int64_t allocated_bytes(const at::Device& device);

/// Threads of the CPU's operators (0 = all cores) and, when `deterministic`, only algorithms that
/// give the same bits each time. For the whole process.
void configure_process(int64_t num_threads, bool deterministic);

namespace cuda {
/// Whether this program was built with CUDA (device_cuda.cpp) or without (device_cpu.cpp).
bool built_in();
/// Driver's name of GPU `index`; empty in builds without CUDA. Throws CudaError.
std::string gpu_name(int index);
}  // namespace cuda

}  // namespace dsv3
