// Normal numbers on the device: a thread for two counters (eight numbers, a 16-byte store in BF16),
// rows by the grid's second dim. Bound by instructions, about 20 a number: the ten rounds of Philox
// and Box-Muller are half each.
//
// The logarithm and the sine must not become the fast approximations: near u = 1 those lose the
// radius. They are polynomials for just the arguments that occur, fitted over their ranges
// (weighted least squares, in FP32 with FMAs): the radius is within 1.3e-7, sine and cosine
// within 8.4e-8.

#include <algorithm>

#include "kernels/detail/launch.cuh"
#include "kernels/detail/philox.h"
#include "kernels/detail/ptx.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/optimizer.h"

namespace dsv3::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCounters = 2, kNumbers = 4 * kCounters;  // of a thread

template <int kCount>
__device__ __forceinline__ float polynomial(float x, const float (&coefficients)[kCount]) {
  float y = coefficients[kCount - 1];
#pragma unroll
  for (int i = kCount - 2; i >= 0; --i) y = fmaf(y, x, coefficients[i]);
  return y;
}

/// sqrt(-2 log u) for u in [2^-24, 1]: u = 2^e · (1 + x), sqrt(1/2) ≤ 1 + x < sqrt(2).
__device__ __forceinline__ float radius_of(float u) {
  constexpr float kRest[] = {0x1.fffffcp-1f, -0x1.555624p-1f, 0x1.000566p-1f, -0x1.9913b0p-2f,
                             0x1.5330c2p-2f, -0x1.2e97c8p-2f, 0x1.25eeeap-2f, -0x1.79e9fcp-3f};
  constexpr float kMinusTwoLn2 = -1.38629436f;
  const int bits = __float_as_int(u);
  const int exponent = (bits - 0x3f3504f3) & ~0x7fffff;  // e · 2^23
  const float x = __int_as_float(bits - exponent) - 1.0f;
  const float square = fmaf(polynomial(x, kRest), x * x, -2.0f * x);  // -2 log(1 + x)
  return detail::ptx::sqrt_approx(
      fmaf(static_cast<float>(exponent), kMinusTwoLn2 * 0x1p-23f, square));
}

/// Sine and cosine of 2π · turn / 2^24, turn < 2^24: of the angle to the nearest quarter turn, then
/// exchanged and signed.
__device__ __forceinline__ void sine_cosine(uint32_t turn, float& sine, float& cosine) {
  constexpr float kSine[] = {0x1.921fb6p+1f, -0x1.4abbbap+2f, 0x1.465ec6p+1f, -0x1.2d9bb8p-1f};
  constexpr float kCosine[] = {1.0f, -0x1.3bd3ccp+2f, 0x1.03c1eap+2f, -0x1.55cb98p+0f,
                               0x1.db64e8p-3f};
  const uint32_t quarter = (turn + (1u << 21)) >> 22;
  const auto rest = static_cast<int>(turn - (quarter << 22));
  const float x = static_cast<float>(rest) * 0x1p-23f;  // half turns, |x| ≤ 1/4
  const float s = polynomial(x * x, kSine) * x, c = polynomial(x * x, kCosine);
  const bool exchanged = (quarter & 1) != 0;
  const uint32_t sine_sign = quarter << 30, cosine_sign = (quarter + 1) << 30;
  sine = __uint_as_float(__float_as_uint(exchanged ? c : s) ^ (sine_sign & 0x80000000u));
  cosine = __uint_as_float(__float_as_uint(exchanged ? s : c) ^ (cosine_sign & 0x80000000u));
}

/// The four numbers of a counter.
__device__ __forceinline__ void numbers_of(const NormalFill& p, uint64_t counter, float* n) {
  const auto words = kernels::detail::philox4x32(p.seed, counter, p.stream);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const float radius = radius_of(kernels::detail::unit_above_zero(words.word[2 * pair]));
    float sine, cosine;
    sine_cosine(words.word[2 * pair + 1] >> 8, sine, cosine);
    n[2 * pair] = fmaf(p.std, radius * cosine, p.mean);
    n[2 * pair + 1] = fmaf(p.std, radius * sine, p.mean);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) fill_kernel(NormalFill p) {
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const int64_t global = p.first + row * p.pitch;
    const int64_t begin = global >> 2, counters = ((global + p.columns + 3) >> 2) - begin;
    T* const y = static_cast<T*>(p.y) + row * p.stride;
    for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kCounters; i < counters;
         i += int64_t{gridDim.x} * kThreads * kCounters) {
      float n[kNumbers];
#pragma unroll
      for (int j = 0; j < kCounters; ++j) numbers_of(p, begin + i + j, n + 4 * j);
      const int64_t column = (begin + i) * 4 - global;
      if (column >= 0 && column + kNumbers <= p.columns && detail::aligned16(y + column)) {
        detail::store8(y + column, n);
      } else {
#pragma unroll
        for (int e = 0; e < kNumbers; ++e) {
          if (column + e >= 0 && column + e < p.columns) {
            y[column + e] = detail::from_float<T>(n[e]);
          }
        }
      }
    }
  }
}

}  // namespace

void normal_fill(const NormalFill& p, Stream stream) {
  if (p.first < 0 || p.pitch < 0) {
    kernels::detail::raise_invalid("normal_fill", "global indices must not be negative");
  }
  if (p.rows <= 0 || p.columns <= 0) return;
  constexpr int64_t kPerBlock = kThreads * kNumbers;
  const int64_t across = (p.columns + 7 + kPerBlock - 1) / kPerBlock;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(across, 4096)),
                  static_cast<unsigned>(std::min<int64_t>(p.rows, 65535)));
  detail::dispatch_float("normal_fill", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    fill_kernel<T><<<grid, kThreads, 0, detail::cuda_stream(stream)>>>(p);
  });
  detail::check_launch("normal_fill");
}

}  // namespace dsv3::kernels::cuda
