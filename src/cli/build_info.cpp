#include "cli/build_info.h"

#include <fmt/format.h>

#include <algorithm>

namespace dsv3::cli {
namespace {

std::string compiler() {
#if defined(__clang__)
  return fmt::format("clang {}.{}.{}", __clang_major__, __clang_minor__, __clang_patchlevel__);
#else
  return fmt::format("g++ {}.{}.{}", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#endif
}

}  // namespace

BuildInfo build_info() {
  BuildInfo info{.version = DSV3_VERSION,
                 .build_type = DSV3_BUILD_TYPE,
                 .compiler = compiler(),
                 .libtorch_version = DSV3_LIBTORCH_VERSION,
                 .libtorch_directory = DSV3_LIBTORCH_DIR,
                 .cuda_version = DSV3_CUDA_VERSION,
                 .cuda_architectures = DSV3_CUDA_ARCHITECTURES};
  return info;
}

std::string version_line() {
  const BuildInfo info = build_info();
  const std::string cuda = info.cuda_version.empty() ? "CPU only" : "CUDA " + info.cuda_version;
  return fmt::format("dsv3 {} ({}, {}, LibTorch {}, {})", info.version, info.build_type,
                     info.compiler, info.libtorch_version, cuda);
}

}  // namespace dsv3::cli
