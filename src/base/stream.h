#pragma once

namespace dsv3 {

/// Where a kernel runs: the host (synchronous, all threads of the process), or one CUDA stream.
struct Stream {
  bool cuda = false;
  void* handle = nullptr;  // cudaStream_t when `cuda`

  static Stream host() { return {}; }
  static Stream on_cuda(void* stream) { return {true, stream}; }
};

}  // namespace dsv3
