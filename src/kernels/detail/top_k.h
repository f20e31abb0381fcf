#pragma once

#include <cstdint>

#include "kernels/detail/cpu.h"

namespace dsv3::kernels::cpu::detail {

/// The k largest of x [n] in descending order, ties to the lower index, NaN as -inf. k ≤ n.
DSV3_INLINE void select_top(const float* x, int32_t n, int32_t k, int32_t* ids, float* values) {
  for (int32_t i = 0; i < n; ++i) {
    const float v = x[i] == x[i] ? x[i] : -__builtin_inff();
    if (i >= k && !(v > values[k - 1])) continue;
    int32_t slot = i < k ? i : k - 1;
    for (; slot > 0 && values[slot - 1] < v; --slot) {
      values[slot] = values[slot - 1];
      ids[slot] = ids[slot - 1];
    }
    values[slot] = v;
    ids[slot] = i;
  }
}

}  // namespace dsv3::kernels::cpu::detail
