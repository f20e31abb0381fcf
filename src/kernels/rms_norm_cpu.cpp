// RMSNorm on the host: threads over rows, a few passes over a row that stays in the first
// cache levels; large results are written past the caches. The weight's gradient is summed over
// fixed blocks of rows, then over the blocks in order, so that the number of threads does not
// change a bit.
#include <cmath>

#include "kernels/detail/cpu.h"
#include "kernels/detail/fp8_cpu.h"
#include "kernels/detail/lanes.h"
#include "kernels/detail/streaming.h"
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
/// Rows whose shares are summed before they join their block's: sums of few terms round less.
constexpr int64_t kRowsPerShare = 16;
/// Elements of a row that a thread keeps while it is normalised.
constexpr int64_t kKeptRow = 8192;
/// Elements of a row that are quantised at once: sixteen tiles.
constexpr int64_t kQuantized = 16 * kFp8Tile;

/// out = x + residual.
template <typename T>
DSV3_INLINE void add_row(const T* __restrict x, const T* __restrict residual, int64_t size,
                         T* __restrict out) {
#pragma omp simd
  for (int64_t d = 0; d < size; ++d) {
    detail::store(&out[d], detail::load(&x[d]) + detail::load(&residual[d]));
  }
}

template <typename T>
DSV3_INLINE void scale_row(const T* __restrict x, const T* __restrict weight, float inv_rms,
                           int64_t size, bool streamed, const T* next, T* y) {
  detail::write_row(
      y, size,
      streamed, [&](int64_t first, int64_t last, T* __restrict out) __attribute__((always_inline)) {
        if (streamed) {
          detail::prefetch_bytes(next + first, (last - first) * static_cast<int64_t>(sizeof(T)));
        }
#pragma omp simd
        for (int64_t d = first; d < last; ++d) {
          detail::store(&out[d - first],
                        detail::load(&x[d]) * (inv_rms * detail::load(&weight[d])));
        }
      });
}

template <typename T>
DSV3_INLINE void quantize_row(const RmsNormForward& p, int64_t t, const T* __restrict x,
                              float inv_rms, bool streamed, const T* next) {
  const T* __restrict weight = static_cast<const T*>(p.weight);
  for (int64_t first = 0; first < p.hidden; first += kQuantized) {
    const int64_t size = std::min(kQuantized, p.hidden - first);
    detail::Room<T, kQuantized> room;
    T* const __restrict part = room.data();
    detail::prefetch_bytes(next + first, size * static_cast<int64_t>(sizeof(T)));
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) {
      detail::store(&part[d],
                    detail::load(&x[first + d]) * (inv_rms * detail::load(&weight[first + d])));
    }
    float* scales = p.quantized.scales + first / kFp8Tile * p.quantized.scale_stride + t;
    uint8_t* to = p.quantized.data + t * p.hidden + first;
    if (!streamed) {
      detail::encode_row_tiles(part, size, p.rule, to, scales, p.quantized.scale_stride);
      continue;
    }
    alignas(64) uint8_t codes[kQuantized];
    detail::encode_row_tiles(part, size, p.rule, codes, scales, p.quantized.scale_stride);
    detail::stream_bytes(to, codes, size);
  }
}

template <typename T>
DSV3_INLINE float inverse_rms(const T* x, int64_t size, float eps) {
  return 1.0f / std::sqrt(detail::dot_rows(x, x, size) / static_cast<float>(size) + eps);
}

template <typename T>
DSV3_INLINE void forward_body(const RmsNormForward& p, int64_t begin, int64_t end, bool streamed) {
  const int64_t D = p.hidden;
  detail::Room<T, kKeptRow> kept;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(p.x) + t * p.x_stride;
    const T* next = x + p.x_stride;  // asked for while this row is written
    if (p.residual != nullptr) {
      T* sum = static_cast<T*>(p.sum) + t * D;
      // A streamed row is read again from here.
      T* to = streamed && D <= kKeptRow ? kept.data() : sum;
      add_row(x, static_cast<const T*>(p.residual) + t * D, D, to);
      if (to != sum) detail::stream_bytes(sum, to, D * static_cast<int64_t>(sizeof(T)));
      x = to;
    }
    const float inv_rms = p.inv_rms_given ? p.inv_rms[t] : inverse_rms(x, D, p.eps);
    if (!p.inv_rms_given && p.inv_rms != nullptr) p.inv_rms[t] = inv_rms;
    if (p.y != nullptr) {
      scale_row(x, static_cast<const T*>(p.weight), inv_rms, D, streamed, next,
                static_cast<T*>(p.y) + t * D);
    }
    if (p.second_weight != nullptr) {
      scale_row(x, static_cast<const T*>(p.second_weight), inv_rms, D, streamed, next,
                static_cast<T*>(p.second_y) + t * D);
    }
    if (p.quantized.data != nullptr) quantize_row(p, t, x, inv_rms, streamed, next);
  }
  detail::stream_fence();
}

/// The rows of a token in backward.
template <typename T>
struct BackwardRow {
  const T *dy, *x, *weight, *second_dy, *second_weight, *dsum;
};

/// dy·weight, of both norms where kSecond.
template <bool kSecond, typename T>
DSV3_INLINE float weighted(const BackwardRow<T>& row, int64_t d) {
  float g = detail::load(&row.dy[d]) * detail::load(&row.weight[d]);
  if constexpr (kSecond) {
    g += detail::load(&row.second_dy[d]) * detail::load(&row.second_weight[d]);
  }
  return g;
}

/// Σ dy·weight · x, in an order that depends on the size only.
template <bool kSecond, typename T>
DSV3_INLINE float weighted_dot(const BackwardRow<T>& row, int64_t size) {
  detail::LaneFloats sum = {}, g, w, v;
  int64_t d = 0;
  for (; d + detail::kLanes <= size; d += detail::kLanes) {
    detail::load_lanes(row.dy + d, g);
    detail::load_lanes(row.weight + d, w);
    g *= w;
    if constexpr (kSecond) {
      detail::load_lanes(row.second_dy + d, v);
      detail::load_lanes(row.second_weight + d, w);
      g += v * w;
    }
    detail::load_lanes(row.x + d, v);
    sum += g * v;
  }
  float total = detail::sum_of_lanes(sum);
  for (; d < size; ++d) total += weighted<kSecond>(row, d) * detail::load(&row.x[d]);
  return total;
}

/// partial += dy · x̂.
template <typename T>
DSV3_INLINE void add_weight_share(const T* __restrict dy, const T* __restrict x, float inv_rms,
                                  int64_t size, float* __restrict partial) {
#pragma omp simd
  for (int64_t d = 0; d < size; ++d) {
    partial[d] += detail::load(&dy[d]) * (detail::load(&x[d]) * inv_rms);
  }
}

template <bool kSecond, bool kSum, typename T>
DSV3_INLINE void write_dx(const BackwardRow<T>& row, float inv_rms, float slope, int64_t size,
                          bool streamed, T* dx) {
  detail::write_row(
      dx, size,
      streamed, [&](int64_t first, int64_t last, T* __restrict out) __attribute__((always_inline)) {
        if (streamed) {
          // The next row, while this one is written.
          const int64_t bytes = (last - first) * static_cast<int64_t>(sizeof(T));
          detail::prefetch_bytes(row.dy + size + first, bytes);
          detail::prefetch_bytes(row.x + size + first, bytes);
          if constexpr (kSecond) detail::prefetch_bytes(row.second_dy + size + first, bytes);
          if constexpr (kSum) detail::prefetch_bytes(row.dsum + last, bytes);
        }
#pragma omp simd
        for (int64_t d = first; d < last; ++d) {
          float v = weighted<kSecond>(row, d) * inv_rms - detail::load(&row.x[d]) * slope;
          if constexpr (kSum) v += detail::load(&row.dsum[d]);
          detail::store(&out[d - first], v);
        }
      });
}

/// partial += share, which is zero afterwards.
DSV3_INLINE void join_share(float* __restrict share, int64_t size, float* __restrict partial) {
#pragma omp simd
  for (int64_t d = 0; d < size; ++d) {
    partial[d] += share[d];
    share[d] = 0.0f;
  }
}

/// Where a block's rows leave their shares of the weights' gradients: [D] each, [2, D] with a
/// second norm.
struct WeightSums {
  float* partial = nullptr;  // the block's; null = not wanted
  float* share = nullptr;    // of kRowsPerShare rows at a time; null: the block has few rows
};

template <bool kSecond, typename T>
DSV3_INLINE void backward_body(const RmsNormBackward& p, int64_t begin, int64_t end, bool streamed,
                               const WeightSums& sums) {
  const int64_t D = p.hidden;
  const int64_t size = kSecond ? 2 * D : D;
  float* const sum = sums.share != nullptr ? sums.share : sums.partial;
  if (sums.partial != nullptr) std::fill_n(sums.partial, size, 0.0f);
  if (sums.share != nullptr) std::fill_n(sums.share, size, 0.0f);
  for (int64_t t = begin; t < end; ++t) {
    const auto at = [&](const void* rows, int64_t stride) {
      return rows != nullptr ? static_cast<const T*>(rows) + t * stride : nullptr;
    };
    const BackwardRow<T> row{at(p.dy, D),        at(p.x, p.x_stride),    at(p.weight, 0),
                             at(p.second_dy, D), at(p.second_weight, 0), at(p.dsum, D)};
    const float inv_rms = p.inv_rms[t];
    const float dot = weighted_dot<kSecond>(row, D);
    if (sum != nullptr) {
      add_weight_share(row.dy, row.x, inv_rms, D, sum);
      if constexpr (kSecond) add_weight_share(row.second_dy, row.x, inv_rms, D, sum + D);
    }
    if (sums.share != nullptr && ((t - begin + 1) % kRowsPerShare == 0 || t + 1 == end)) {
      join_share(sums.share, size, sums.partial);
    }
    const float slope = dot * inv_rms * inv_rms * inv_rms / static_cast<float>(D);
    T* dx = static_cast<T*>(p.dx) + t * D;
    if (p.dsum != nullptr) {
      write_dx<kSecond, true>(row, inv_rms, slope, D, streamed, dx);
    } else {
      write_dx<kSecond, false>(row, inv_rms, slope, D, streamed, dx);
    }
  }
  detail::stream_fence();
}

DSV3_CLONES void forward_rows(const RmsNormForward& p, const float*, int64_t begin, int64_t end,
                              bool streamed) {
  forward_body<float>(p, begin, end, streamed);
}
DSV3_CLONES void forward_rows(const RmsNormForward& p, const BFloat16*, int64_t begin, int64_t end,
                              bool streamed) {
  forward_body<BFloat16>(p, begin, end, streamed);
}
DSV3_CLONES void backward_rows(const RmsNormBackward& p, const float*, int64_t begin, int64_t end,
                               bool streamed, const WeightSums& sums) {
  if (p.second_dy != nullptr) return backward_body<true, float>(p, begin, end, streamed, sums);
  backward_body<false, float>(p, begin, end, streamed, sums);
}
DSV3_CLONES void backward_rows(const RmsNormBackward& p, const BFloat16*, int64_t begin,
                               int64_t end, bool streamed, const WeightSums& sums) {
  if (p.second_dy != nullptr) return backward_body<true, BFloat16>(p, begin, end, streamed, sums);
  backward_body<false, BFloat16>(p, begin, end, streamed, sums);
}

/// dweight[d] += Σ partials[b, d], blocks joined in pairs; the first block's row becomes the sum.
template <typename T>
void add_partials(T* dweight, float* partials, int64_t blocks, int64_t stride, int64_t D) {
  for (int64_t step = 1; step < blocks; step *= 2) {
    for (int64_t b = 0; b + step < blocks; b += 2 * step) {
      float* __restrict to = partials + b * stride;
      const float* __restrict row = partials + (b + step) * stride;
      for (int64_t d = 0; d < D; ++d) to[d] += row[d];
    }
  }
  for (int64_t d = 0; d < D; ++d) {
    detail::store(&dweight[d], detail::load(&dweight[d]) + partials[d]);
  }
}

}  // namespace

void rms_norm_forward(const RmsNormForward& p) {
  const int64_t row_bytes = p.hidden * size_of(p.dtype);
  const bool streamed = p.num_tokens * row_bytes >= detail::kStreamedBytes;
  detail::dispatch_float("rms_norm", p.dtype, [&](auto* type) {
    detail::parallel_rows(p.num_tokens, 3 * row_bytes, [&](int64_t begin, int64_t end) {
      forward_rows(p, type, begin, end, streamed);
    });
  });
}

void rms_norm_backward(const RmsNormBackward& p) {
  const int64_t row_bytes = p.hidden * size_of(p.dtype);
  const bool streamed = p.num_tokens * row_bytes >= detail::kStreamedBytes;
  const bool weights = p.dweight != nullptr || p.second_dweight != nullptr;
  detail::dispatch_float("rms_norm_backward", p.dtype, [&](auto* type) {
    if (!weights) {
      detail::parallel_rows(p.num_tokens, 4 * row_bytes, [&](int64_t begin, int64_t end) {
        backward_rows(p, type, begin, end, streamed, {});
      });
      return;
    }
    const int64_t blocks =
        std::min((p.num_tokens + kHostRowsPerPartial - 1) / kHostRowsPerPartial, kHostMaxPartials);
    if (blocks == 0) return;
    const int64_t rows = (p.num_tokens + blocks - 1) / blocks;
    const int64_t stride = p.second_dy != nullptr ? 2 * p.hidden : p.hidden;
    // The scratch holds two rows a block from the second of its own partial sums on.
    const bool shared_out = p.num_tokens > kRowsPerPartial;
    detail::parallel_rows(blocks, rows * 4 * row_bytes, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const WeightSums sums{.partial = p.scratch + b * stride,
                              .share = shared_out ? p.scratch + (blocks + b) * stride : nullptr};
        backward_rows(p, type, std::min(b * rows, p.num_tokens),
                      std::min((b + 1) * rows, p.num_tokens), streamed, sums);
      }
    });
    detail::dispatch_float("rms_norm_backward", p.dweight_dtype, [&](auto* grad) {
      using G = std::remove_pointer_t<decltype(grad)>;
      if (p.dweight != nullptr) {
        add_partials(static_cast<G*>(p.dweight), p.scratch, blocks, stride, p.hidden);
      }
      if (p.second_dweight != nullptr) {
        add_partials(static_cast<G*>(p.second_dweight), p.scratch + p.hidden, blocks, stride,
                     p.hidden);
      }
    });
  });
}

}  // namespace cpu
}  // namespace dsv3::kernels
