#include "monitor/hardware.h"

#include <unistd.h>

#include <array>
#include <fstream>
#include <utility>

namespace dsv3 {

std::optional<double> peak_bf16_tflops(std::string_view gpu_name) {
  // The first match counts: longer names stand before those that they contain.
  static constexpr std::array<std::pair<std::string_view, double>, 18> kPeaks{{
      {"GB300", 2500.0},
      {"B300", 2500.0},
      {"GB200", 2500.0},
      {"B200", 2250.0},
      {"H100 PCIe", 756.0},
      {"H100 NVL", 835.0},
      {"GH200", 989.4},
      {"H100", 989.4},
      {"H200", 989.4},
      {"H800", 989.4},
      {"H20", 148.0},
      {"A100", 312.0},
      {"A800", 312.0},
      {"L40S", 362.0},
      {"L40", 181.0},
      {"A40", 149.7},
      {"A10G", 70.0},
      {"RTX 4090", 165.2},
  }};
  for (const auto& [name, peak] : kPeaks)
    if (gpu_name.find(name) != std::string_view::npos) return peak;
  return std::nullopt;
}

int64_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  int64_t total = 0, resident = 0;
  if (!(file >> total >> resident)) return 0;
  return resident * ::sysconf(_SC_PAGESIZE);
}

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "CPU";
}

}  // namespace dsv3
