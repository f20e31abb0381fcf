#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace dsv3::kernels {

/// average += rate · (x - average) on the host's threads: one update of a moving average.
struct MovingAverage {
  int64_t size;    // elements
  DType dtype;     // of x: kF32 or kBF16
  const void* x;   // [size]
  float* average;  // [size]
  float rate;      // 1 - decay; 1 copies x into an average of zeros
};

namespace cpu {
/// The average lives in host memory only: there is no body for the device.
void moving_average(const MovingAverage& p);
}  // namespace cpu

}  // namespace dsv3::kernels
