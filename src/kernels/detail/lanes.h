#pragma once

// Sixteen floats side by side for sums and maxima, which a compiler may not reorder by itself:
// element i goes to lane i mod 16, lanes are joined pairwise. The result depends on the length
// only, not on the machine or the threads.

#include <cstdint>

#include "kernels/detail/cpu.h"

namespace dsv3::kernels::cpu::detail {

inline constexpr int64_t kLanes = 16;

using LaneFloats [[gnu::vector_size(64), gnu::aligned(4), gnu::may_alias]] = float;
using LaneShorts [[gnu::vector_size(32), gnu::aligned(2), gnu::may_alias]] = uint16_t;
using LaneInts [[gnu::vector_size(64)]] = uint32_t;

/// Note: by reference, because passing such vectors by value would depend on the machine's ABI.
DSV3_INLINE void load_lanes(const float* x, LaneFloats& out) {
  out = *reinterpret_cast<const LaneFloats*>(x);
}
DSV3_INLINE void load_lanes(const BFloat16* x, LaneFloats& out) {
  const LaneInts wide = __builtin_convertvector(*reinterpret_cast<const LaneShorts*>(x), LaneInts);
  out = reinterpret_cast<LaneFloats>(wide << 16);
}

DSV3_INLINE float sum_of_lanes(const LaneFloats& x) {
  float v[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) v[i] = x[i];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

template <typename T>
DSV3_INLINE float sum_row(const T* x, int64_t size) {
  LaneFloats sum = {}, v;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    load_lanes(x + i, v);
    sum += v;
  }
  float total = sum_of_lanes(sum);
  for (; i < size; ++i) total += load(x + i);
  return total;
}

template <typename A, typename B>
DSV3_INLINE float dot_rows(const A* a, const B* b, int64_t size) {
  LaneFloats sum = {}, v, w;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    load_lanes(a + i, v);
    load_lanes(b + i, w);
    sum += v * w;
  }
  float total = sum_of_lanes(sum);
  for (; i < size; ++i) total += load(a + i) * load(b + i);
  return total;
}

/// The largest element; -inf for an empty row. NaN may be passed over.
template <typename T>
DSV3_INLINE float max_row(const T* x, int64_t size) {
  float largest = -__builtin_inff();
  int64_t i = 0;
  if (size >= kLanes) {
    LaneFloats top, v;
    load_lanes(x, top);
    for (i = kLanes; i + kLanes <= size; i += kLanes) {
      load_lanes(x + i, v);
      top = v > top ? v : top;
    }
    for (int64_t j = 0; j < kLanes; ++j) largest = top[j] > largest ? top[j] : largest;
  }
  for (; i < size; ++i) {
    const float v = load(x + i);
    largest = v > largest ? v : largest;
  }
  return largest;
}

}  // namespace dsv3::kernels::cpu::detail
