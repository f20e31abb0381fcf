// SwiGLU on the host: threads over rows, a vector exponential inside.
#include "kernels/detail/cpu.h"
#include "kernels/elementwise.h"

namespace dsv3::kernels::cpu {
namespace {

template <typename T>
DSV3_INLINE void forward_body(const SwigluForward& p, int64_t begin, int64_t end) {
  const int64_t I = p.intermediate;
  for (int64_t t = begin; t < end; ++t) {
    const T* __restrict gate = static_cast<const T*>(p.gate_up) + t * 2 * I;
    const T* __restrict up = gate + I;
    T* __restrict y = static_cast<T*>(p.y) + t * I;
#pragma omp simd
    for (int64_t i = 0; i < I; ++i) {
      const float g = detail::load(&gate[i]);
      detail::store(&y[i], g / (1.0f + detail::exp_fast(-g)) * detail::load(&up[i]));
    }
  }
}

template <typename T>
DSV3_INLINE void backward_body(const SwigluBackward& p, int64_t begin, int64_t end) {
  const int64_t I = p.intermediate;
  for (int64_t t = begin; t < end; ++t) {
    const T* gate = static_cast<const T*>(p.gate_up) + t * 2 * I;
    const T* dy = static_cast<const T*>(p.dy) + t * I;
    T* dgate = static_cast<T*>(p.dgate_up) + t * 2 * I;
// Note: dgate may be gate: each element is read before it is written, by the same iteration.
#pragma omp simd
    for (int64_t i = 0; i < I; ++i) {
      const float g = detail::load(&gate[i]), u = detail::load(&gate[I + i]),
                  d = detail::load(&dy[i]);
      const float sigmoid = 1.0f / (1.0f + detail::exp_fast(-g));
      const float silu = g * sigmoid;
      detail::store(&dgate[i], d * u * (sigmoid + silu * (1.0f - sigmoid)));
      detail::store(&dgate[I + i], d * silu);
    }
  }
}

DSV3_CLONES void forward_rows(const SwigluForward& p, const float*, int64_t begin, int64_t end) {
  forward_body<float>(p, begin, end);
}
DSV3_CLONES void forward_rows(const SwigluForward& p, const BFloat16*, int64_t begin, int64_t end) {
  forward_body<BFloat16>(p, begin, end);
}
DSV3_CLONES void backward_rows(const SwigluBackward& p, const float*, int64_t begin, int64_t end) {
  backward_body<float>(p, begin, end);
}
DSV3_CLONES void backward_rows(const SwigluBackward& p, const BFloat16*, int64_t begin,
                               int64_t end) {
  backward_body<BFloat16>(p, begin, end);
}

}  // namespace

void swiglu_forward(const SwigluForward& p) {
  detail::dispatch_float("swiglu", p.dtype, [&](auto* type) {
    detail::parallel_rows(p.num_tokens, 3 * p.intermediate * size_of(p.dtype),
                          [&](int64_t begin, int64_t end) { forward_rows(p, type, begin, end); });
  });
}

void swiglu_backward(const SwigluBackward& p) {
  detail::dispatch_float("swiglu_backward", p.dtype, [&](auto* type) {
    detail::parallel_rows(p.num_tokens, 5 * p.intermediate * size_of(p.dtype),
                          [&](int64_t begin, int64_t end) { backward_rows(p, type, begin, end); });
  });
}

}  // namespace dsv3::kernels::cpu
