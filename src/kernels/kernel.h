#pragma once

#include "base/dtype.h"
#include "base/stream.h"

/// Declares an operation's two bodies and the one place that chooses between them: `cpu::NAME` runs
/// on the host's threads, `cuda::NAME` is asynchronous on the stream (a stub that throws in builds
/// without CUDA, kernels/no_cuda.cpp).
#define DSV3_DECLARE_KERNEL(name, Params)               \
  namespace cpu {                                       \
  void name(const Params& p);                           \
  }                                                     \
  namespace cuda {                                      \
  void name(const Params& p, Stream stream);            \
  }                                                     \
  inline void name(const Params& p, Stream stream) {    \
    stream.cuda ? cuda::name(p, stream) : cpu::name(p); \
  }
