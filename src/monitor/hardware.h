#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace dsv3 {

/// Dense BF16 peak in TFLOP/s of a GPU by the name that its driver reports ("NVIDIA H200"), from
/// the vendor's data sheets, without sparsity; nothing when the name is unknown.
std::optional<double> peak_bf16_tflops(std::string_view gpu_name);

/// Bytes of this process that stand in main memory (Linux; 0 elsewhere).
int64_t resident_bytes();

/// "AMD EPYC 9654, 2 threads": the processor's name as /proc/cpuinfo has it.
std::string processor_name();

}  // namespace dsv3
