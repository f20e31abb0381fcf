#pragma once

namespace dsv3::test {

/// While one lives, LibTorch throws c10::Error where the host would wait for a GPU (LibTorch's
/// synchronisation debug mode). Without CUDA in the build it does nothing.
class ForbidWaiting {
 public:
  ForbidWaiting();
  ~ForbidWaiting();
  ForbidWaiting(const ForbidWaiting&) = delete;
  ForbidWaiting& operator=(const ForbidWaiting&) = delete;
};

}  // namespace dsv3::test
