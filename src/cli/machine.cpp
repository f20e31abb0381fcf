#include "cli/machine.h"

#include <sched.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string_view>

namespace dsv3::cli {
namespace {

/// The value of the first line "KEY : value" of /proc/cpuinfo.
std::string cpuinfo_value(std::string_view key) {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    const size_t colon = line.find(':');
    if (line.starts_with(key) && colon != std::string::npos && colon + 2 <= line.size()) {
      return line.substr(colon + 2);
    }
  }
  return "";
}

bool has_flag(const std::string& flags, const std::string& flag) {
  return (" " + flags + " ").find(" " + flag + " ") != std::string::npos;
}

}  // namespace

CpuFacts cpu_facts() {
  const std::string flags = cpuinfo_value("flags");
  CpuFacts facts;
  facts.model = cpuinfo_value("model name");
  cpu_set_t set;
  CPU_ZERO(&set);
  facts.num_cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set)
                                                                 : sysconf(_SC_NPROCESSORS_ONLN);
  const double bytes =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  facts.memory_gib = bytes / (1024.0 * 1024.0 * 1024.0);
  facts.avx2 = has_flag(flags, "avx2");
  facts.avx512 = has_flag(flags, "avx512f");
  facts.avx512_bf16 = has_flag(flags, "avx512_bf16");
  facts.amx_bf16 = has_flag(flags, "amx_bf16");
  return facts;
}

bool nvidia_driver_present() {
  std::error_code ignored;
  return std::filesystem::exists("/proc/driver/nvidia/version", ignored) ||
         std::filesystem::exists("/dev/nvidiactl", ignored);
}

}  // namespace dsv3::cli
