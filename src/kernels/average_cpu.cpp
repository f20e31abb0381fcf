// A moving average in host memory: threads share the range, inner loops are vector code at memory
// speed. Reads x and the average, writes the average.
#include "kernels/average.h"
#include "kernels/detail/cpu.h"

namespace dsv3::kernels::cpu {
namespace {

using namespace detail;

template <typename T>
DSV3_INLINE void average_range(const void* source, float* average, float rate, int64_t begin,
                               int64_t end) {
  const T* const __restrict x = static_cast<const T*>(source);
  float* const __restrict y = average;
  for (int64_t i = begin; i < end; ++i) y[i] += rate * (load(x + i) - y[i]);
}

DSV3_CLONES void average_f32(const void* x, float* average, float rate, int64_t begin,
                             int64_t end) {
  average_range<float>(x, average, rate, begin, end);
}
DSV3_CLONES void average_bf16(const void* x, float* average, float rate, int64_t begin,
                              int64_t end) {
  average_range<BFloat16>(x, average, rate, begin, end);
}

}  // namespace

void moving_average(const MovingAverage& p) {
  dispatch_float("moving_average", p.dtype, [](auto*) {});
  const auto body = p.dtype == DType::kF32 ? average_f32 : average_bf16;
  constexpr int64_t kBlock = 4096;
  parallel_rows((p.size + kBlock - 1) / kBlock, 12 * kBlock, [&](int64_t first, int64_t last) {
    body(p.x, p.average, p.rate, first * kBlock, std::min(p.size, last * kBlock));
  });
}

}  // namespace dsv3::kernels::cpu
