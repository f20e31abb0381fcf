#pragma once

#include <string>

namespace dsv3::cli {

/// What this executable was built from and with; empty strings where a thing was not used.
struct BuildInfo {
  std::string version;             // of dsv3
  std::string build_type;          // Release, Debug, …
  std::string compiler;            // name and version of the C++ compiler
  std::string libtorch_version;    // of the headers
  std::string libtorch_directory;  // where the build found LibTorch
  std::string cuda_version;        // of the toolkit; empty in a build without CUDA
  std::string cuda_architectures;  // "80-real 90a-real"
};

BuildInfo build_info();

/// One line for `dsv3 --version`.
std::string version_line();

}  // namespace dsv3::cli
