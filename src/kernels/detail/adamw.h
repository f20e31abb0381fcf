#pragma once

// The element of AdamW and its checks, for the host's and the device's body.

#include <cmath>

#include "kernels/optimizer.h"

#ifdef __CUDACC__
#define DSV3_ADAMW_INLINE __host__ __device__ __forceinline__
#else
#define DSV3_ADAMW_INLINE inline __attribute__((always_inline))
#endif

namespace dsv3::kernels::detail {

/// Updates weight w and moments m, v from the clipped gradient g.
DSV3_ADAMW_INLINE void adamw_element(const AdamW& p, float g, float& w, float& m, float& v) {
  w -= p.learning_rate * p.weight_decay * w;
  m += (1.0f - p.beta1) * (g - m);
  v = p.beta2 * v + (1.0f - p.beta2) * g * g;
  w -= p.learning_rate / p.correction1 * m / (sqrtf(v / p.correction2) + p.eps);
}

/// Throws std::invalid_argument when dtypes do not fit or a correction is not positive.
void check_adamw(const AdamW& p);

}  // namespace dsv3::kernels::detail
