// RMSNorm on the host: threads over rows, two passes over a row that stays in the first cache
// level. The weight's gradient is summed over fixed blocks of rows, then over the blocks in order,
// so that the number of threads does not change a bit.
#include <cmath>

#include "kernels/detail/cpu.h"
#include "kernels/elementwise.h"

namespace dsv3::kernels {

namespace {
/// Blocks whose partial sums of dweight are kept: enough for every thread and CUDA block.
constexpr int64_t kMaxPartials = 528;
constexpr int64_t kRowsPerPartial = 16;
}  // namespace

int64_t rms_norm_backward_scratch(int64_t num_tokens, int64_t hidden, bool second) {
  const int64_t blocks = (num_tokens + kRowsPerPartial - 1) / kRowsPerPartial;
  return std::min(std::max<int64_t>(blocks, 1), kMaxPartials) * hidden * (second ? 2 : 1);
}

namespace cpu {
namespace {

constexpr int64_t kHostRowsPerPartial = 64;
constexpr int64_t kHostMaxPartials = 64;

template <typename T>
DSV3_INLINE void forward_body(const RmsNormForward& p, int64_t begin, int64_t end) {
  const int64_t D = p.hidden;
  const T* __restrict weight = static_cast<const T*>(p.weight);
  for (int64_t t = begin; t < end; ++t) {
    const T* __restrict x = static_cast<const T*>(p.x) + t * p.x_stride;
    T* __restrict y = static_cast<T*>(p.y) + t * D;
    float squares = 0.0f;
    if (p.residual != nullptr) {
      const T* __restrict residual = static_cast<const T*>(p.residual) + t * D;
      T* __restrict sum = static_cast<T*>(p.sum) + t * D;
#pragma omp simd reduction(+ : squares)
      for (int64_t d = 0; d < D; ++d) {
        detail::store(&sum[d], detail::load(&x[d]) + detail::load(&residual[d]));
        const float s = detail::load(&sum[d]);
        squares += s * s;
      }
      x = sum;
    } else {
#pragma omp simd reduction(+ : squares)
      for (int64_t d = 0; d < D; ++d) {
        const float s = detail::load(&x[d]);
        squares += s * s;
      }
    }
    const float inv_rms = 1.0f / std::sqrt(squares / static_cast<float>(D) + p.eps);
    if (p.inv_rms != nullptr) p.inv_rms[t] = inv_rms;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d)
      detail::store(&y[d], detail::load(&x[d]) * inv_rms * detail::load(&weight[d]));
  }
}

/// `partial` [D] or null: where these rows' share of dweight is summed.
template <typename T>
DSV3_INLINE void backward_body(const RmsNormBackward& p, int64_t begin, int64_t end,
                               float* __restrict partial) {
  const int64_t D = p.hidden;
  const T* __restrict weight = static_cast<const T*>(p.weight);
  for (int64_t d = 0; partial != nullptr && d < D; ++d) partial[d] = 0.0f;
  for (int64_t t = begin; t < end; ++t) {
    const T* __restrict x = static_cast<const T*>(p.x) + t * p.x_stride;
    const T* __restrict dy = static_cast<const T*>(p.dy) + t * D;
    T* __restrict dx = static_cast<T*>(p.dx) + t * D;
    const float inv_rms = p.inv_rms[t];
    float dot = 0.0f;
    if (partial != nullptr) {
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < D; ++d) {
        const float g = detail::load(&dy[d]) * detail::load(&x[d]);
        partial[d] += g * inv_rms;
        dot += g * detail::load(&weight[d]);
      }
    } else {
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < D; ++d)
        dot += detail::load(&dy[d]) * detail::load(&x[d]) * detail::load(&weight[d]);
    }
    const float slope = dot * inv_rms * inv_rms * inv_rms / static_cast<float>(D);
    if (p.dsum != nullptr) {
      const T* __restrict dsum = static_cast<const T*>(p.dsum) + t * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        detail::store(&dx[d], detail::load(&dsum[d]) +
                                  detail::load(&dy[d]) * detail::load(&weight[d]) * inv_rms -
                                  detail::load(&x[d]) * slope);
      }
    } else {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        detail::store(&dx[d], detail::load(&dy[d]) * detail::load(&weight[d]) * inv_rms -
                                  detail::load(&x[d]) * slope);
      }
    }
  }
}

DSV3_CLONES void forward_rows(const RmsNormForward& p, const float*, int64_t begin, int64_t end) {
  forward_body<float>(p, begin, end);
}
DSV3_CLONES void forward_rows(const RmsNormForward& p, const BFloat16*, int64_t begin,
                              int64_t end) {
  forward_body<BFloat16>(p, begin, end);
}
DSV3_CLONES void backward_rows(const RmsNormBackward& p, const float*, int64_t begin, int64_t end,
                               float* partial) {
  backward_body<float>(p, begin, end, partial);
}
DSV3_CLONES void backward_rows(const RmsNormBackward& p, const BFloat16*, int64_t begin,
                               int64_t end, float* partial) {
  backward_body<BFloat16>(p, begin, end, partial);
}

/// dweight[d] += Σ partials[b, d], in the order of the blocks; the first block's row is the sum.
template <typename T>
void add_partials(T* dweight, float* __restrict partials, int64_t blocks, int64_t D) {
  for (int64_t b = 1; b < blocks; ++b) {
    const float* __restrict row = partials + b * D;
    for (int64_t d = 0; d < D; ++d) partials[d] += row[d];
  }
  for (int64_t d = 0; d < D; ++d) {
    detail::store(&dweight[d], detail::load(&dweight[d]) + partials[d]);
  }
}

}  // namespace

void rms_norm_forward(const RmsNormForward& p) {
  detail::dispatch_float("rms_norm", p.dtype, [&](auto* type) {
    detail::parallel_rows(p.num_tokens, 3 * p.hidden * size_of(p.dtype),
                          [&](int64_t begin, int64_t end) { forward_rows(p, type, begin, end); });
  });
}

void rms_norm_backward(const RmsNormBackward& p) {
  const int64_t bytes = 4 * p.hidden * size_of(p.dtype);
  detail::dispatch_float("rms_norm_backward", p.dtype, [&](auto* type) {
    if (p.dweight == nullptr) {
      detail::parallel_rows(p.num_tokens, bytes, [&](int64_t begin, int64_t end) {
        backward_rows(p, type, begin, end, nullptr);
      });
      return;
    }
    const int64_t blocks =
        std::min((p.num_tokens + kHostRowsPerPartial - 1) / kHostRowsPerPartial, kHostMaxPartials);
    if (blocks == 0) return;
    const int64_t rows = (p.num_tokens + blocks - 1) / blocks;
    detail::parallel_rows(blocks, rows * bytes, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        backward_rows(p, type, std::min(b * rows, p.num_tokens),
                      std::min((b + 1) * rows, p.num_tokens), p.scratch + b * p.hidden);
      }
    });
    detail::dispatch_float("rms_norm_backward", p.dweight_dtype, [&](auto* grad) {
      add_partials(static_cast<decltype(grad)>(p.dweight), p.scratch, blocks, p.hidden);
    });
  });
}

}  // namespace cpu
}  // namespace dsv3::kernels
