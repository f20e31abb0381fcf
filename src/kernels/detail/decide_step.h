#pragma once

// The decision itself, for the host's and the device's body.

#include <cmath>

#include "kernels/optimizer.h"

#ifdef __CUDACC__
#define DSV3_DECIDE_INLINE __host__ __device__ __forceinline__
#else
#define DSV3_DECIDE_INLINE inline
#endif

namespace dsv3::kernels::detail {

/// NaN - NaN and infinity - infinity are NaN.
DSV3_DECIDE_INLINE bool finite(double x) {
  return x - x == 0.0;
}

DSV3_DECIDE_INLINE void decide(const DecideStep& p) {
  bool all_finite = *p.skip == 0;
  for (int32_t i = 0; i < p.num_losses; ++i) all_finite = all_finite && finite(p.losses[i]);
  int32_t skip = all_finite ? 0 : kSkipNotFinite;
  if (skip == 0 && p.num_losses > 0 && p.losses[0] * p.loss_scale > p.loss_limit) skip = kSkipSpike;
  const int64_t updates = *p.updates + (skip == 0 ? 1 : 0);
  const auto count = static_cast<double>(updates > 0 ? updates : 1);
  p.corrections[0] = static_cast<float>(1.0 - pow(p.beta1, count));
  p.corrections[1] = static_cast<float>(1.0 - pow(p.beta2, count));
  *p.updates = updates;
  *p.skip = skip;
}

}  // namespace dsv3::kernels::detail
