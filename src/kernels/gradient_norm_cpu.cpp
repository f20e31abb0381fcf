// Sum of squares and clip factor on the host. The cut into partial sums depends on the size only,
// so that the bits do not depend on the number of threads.

#include <cmath>

#include "kernels/detail/cpu.h"
#include "kernels/detail/lanes.h"
#include "kernels/optimizer.h"

namespace dsv3::kernels::cpu {
namespace {

using namespace detail;

/// FP32 within 2048 elements, FP64 beyond.
template <typename T>
DSV3_INLINE double squares(const T* x, int64_t size) {
  constexpr int64_t kBlock = 2048;
  double sum = 0.0;
  for (int64_t i = 0; i < size; i += kBlock) {
    sum += dot_rows(x + i, x + i, std::min(kBlock, size - i));
  }
  return sum;
}

DSV3_CLONES double squares_f32(const void* x, int64_t begin, int64_t size) {
  return squares(static_cast<const float*>(x) + begin, size);
}
DSV3_CLONES double squares_bf16(const void* x, int64_t begin, int64_t size) {
  return squares(static_cast<const BFloat16*>(x) + begin, size);
}

}  // namespace

void sum_of_squares(const SumOfSquares& p) {
  dispatch_float("sum_of_squares", p.dtype, [](auto*) {});
  const auto body = p.dtype == DType::kF32 ? squares_f32 : squares_bf16;
  constexpr int64_t kSmallest = 16384;
  const int64_t part =
      std::max(kSmallest, (p.size + kSumOfSquaresPartials - 1) / kSumOfSquaresPartials);
  const int64_t count = (p.size + part - 1) / part;
  parallel_rows(count, part * size_of(p.dtype), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      p.partials[i] = body(p.x, i * part, std::min(part, p.size - i * part));
    }
  });
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += p.partials[i];
  *p.result = sum;
}

void finish_norm(const FinishNorm& p) {
  double sum = 0.0;
  for (int32_t i = 0; i < p.count; ++i) sum += p.sums[i];
  const auto norm = static_cast<float>(std::sqrt(sum));
  *p.norm = norm;
  if (p.clip_factor != nullptr) {
    *p.clip_factor = p.max_norm > 0.0f ? std::fmin(1.0f, p.max_norm / (norm + 1e-6f)) : 1.0f;
  }
  if (p.not_finite != nullptr) *p.not_finite = std::isfinite(norm) ? 0 : 1;
}

}  // namespace dsv3::kernels::cpu
