#pragma once

// What the host's bodies share: threads over rows, vector code for the machine at hand, dtypes.

#include <omp.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/bfloat16.h"
#include "base/dtype.h"
#include "base/error.h"

/// On a function over a range of rows: compiled for AVX-512, AVX2 and the baseline, chosen when the
/// program is loaded. What it calls must be DSV3_INLINE, or it is compiled for the baseline only.
/// Open parallel regions outside of it. Sanitizers instrument the choice itself and crash in it.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DSV3_CLONES
#elif defined(__clang__)
#define DSV3_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define DSV3_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#define DSV3_INLINE inline __attribute__((always_inline))

namespace dsv3::kernels::cpu::detail {

/// Below this much memory traffic a parallel region costs more than it saves.
inline constexpr int64_t kParallelBytes = 64 * 1024;

/// Calls fn(begin, end) for parts of [0, rows) on the process's threads, or once when the work is
/// small or a parallel region is open already. fn must not throw. Where the cuts fall depends on
/// the number of threads: fn's result for a row must not depend on its neighbours.
template <typename Fn>
void parallel_rows(int64_t rows, int64_t bytes_per_row, const Fn& fn) {
  if (rows <= 0) return;
  const int64_t most = std::max<int64_t>(1, rows * bytes_per_row / (kParallelBytes / 2));
  const int threads = static_cast<int>(std::min<int64_t>({omp_get_max_threads(), rows, most}));
  if (threads <= 1 || rows * bytes_per_row < kParallelBytes || omp_in_parallel()) {
    fn(int64_t{0}, rows);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t count = omp_get_num_threads(), self = omp_get_thread_num();
    const int64_t begin = rows * self / count, end = rows * (self + 1) / count;
    if (begin < end) fn(begin, end);
  }
}

/// An array of `size` elements on the stack that is not filled beforehand: BFloat16's zeros would
/// be written each time a loop comes by.
template <typename T, int64_t size>
class Room {
 public:
  DSV3_INLINE T* data() { return reinterpret_cast<T*>(bytes_); }

 private:
  alignas(64) std::byte bytes_[size * static_cast<int64_t>(sizeof(T))];
};

DSV3_INLINE float load(const float* x) {
  return *x;
}
DSV3_INLINE float load(const BFloat16* x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x->bits) << 16);
}

DSV3_INLINE void store(float* x, float v) {
  *x = v;
}
/// Rounds to nearest even without a branch, so that loops vectorise; NaN stays NaN.
DSV3_INLINE void store(BFloat16* x, float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  x->bits = static_cast<uint16_t>(v != v ? nan : rounded);
}

/// e^x to about 1 ulp of FP32 without a branch: 2^n · e^r with |r| ≤ ln2/2 and a polynomial of
/// degree 7 (Taylor's with the last terms bent to the interval). Underflows to 0 below -87.3,
/// overflows to infinity above 88.7; NaN gives NaN.
DSV3_INLINE float exp_fast(float x) {
  const float low = x < -87.33654f ? -87.33654f : x;
  const float clamped = low > 88.72283f ? 88.72283f : low;
  const float shifted =
      clamped * 1.44269504f + 12582912.0f;  // rounds to an integer in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // Two factors, because n = 128 alone has no float.
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - 0x4b400000;
  const int32_t half = exponent >> 1;
  const float a = std::bit_cast<float>((half + 127) << 23);
  const float b = std::bit_cast<float>((exponent - half + 127) << 23);
  float y = p * a * b;
  y = x < -87.33654f ? 0.0f : y;
  y = x > 88.72283f ? __builtin_inff() : y;
  return x != x ? x : y;
}

/// Calls fn with a null pointer of the host type of `dtype`: dispatch_float("swiglu", p.dtype,
/// [&](auto* type) {…}).
template <typename Fn>
void dispatch_float(const char* name, DType dtype, const Fn& fn) {
  if (dtype == DType::kF32) {
    fn(static_cast<float*>(nullptr));
  } else if (dtype == DType::kBF16) {
    fn(static_cast<BFloat16*>(nullptr));
  } else {
    invalid("[{}] dtype: expected fp32 or bf16, got {}", name, name_of(dtype));
  }
}

}  // namespace dsv3::kernels::cpu::detail
