#pragma once

// Sixteen floats side by side for sums and maxima, which a compiler may not reorder by itself. A
// sum has four times sixteen shares, for 1024 elements at a time, that are joined pairwise: as
// exact as LibTorch's own sums. The result depends on the length only, not on the machine or the
// threads.

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

/// Σ term(i) where term(i, out) leaves the terms of elements i … i + 15 in `out` and term(i) is one
/// alone.
template <typename Term, typename One>
DSV3_INLINE float sum_terms(int64_t size, const Term& term, const One& one) {
  constexpr int64_t kStep = 4 * kLanes, kPart = 1024;
  LaneFloats total = {}, v;
  int64_t i = 0;
  while (i + kStep <= size) {
    LaneFloats a = {}, b = {}, c = {}, d = {};  // no array: that would stand in memory
    for (const int64_t end = std::min(i + kPart, size - kStep + 1); i < end; i += kStep) {
      term(i, v);
      a += v;
      term(i + kLanes, v);
      b += v;
      term(i + 2 * kLanes, v);
      c += v;
      term(i + 3 * kLanes, v);
      d += v;
    }
    total += (a + b) + (c + d);
  }
  for (; i + kLanes <= size; i += kLanes) {
    term(i, v);
    total += v;
  }
  float rest = 0.0f;
  for (; i < size; ++i) rest += one(i);
  return sum_of_lanes(total) + rest;
}

template <typename T>
DSV3_INLINE float sum_row(const T* x, int64_t size) {
  return sum_terms(
      size, [&](int64_t i, LaneFloats & v) __attribute__((always_inline)) { load_lanes(x + i, v); },
      [&](int64_t i) __attribute__((always_inline)) { return load(x + i); });
}

template <typename A, typename B>
DSV3_INLINE float dot_rows(const A* a, const B* b, int64_t size) {
  return sum_terms(
      size,
      [&](int64_t i, LaneFloats & v) __attribute__((always_inline)) {
        LaneFloats w;
        load_lanes(a + i, v);
        load_lanes(b + i, w);
        v *= w;
      },
      [&](int64_t i) __attribute__((always_inline)) { return load(a + i) * load(b + i); });
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
