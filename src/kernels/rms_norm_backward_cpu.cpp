// RMSNorm's gradient on the host: threads over blocks of rows, a few rows at a time. The weight's
// gradient is summed over fixed blocks of rows, then over the blocks in order, so that the number
// of threads does not change a bit.
#include "kernels/detail/cpu.h"
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

/// A token's rows in backward.
template <typename T>
struct BackwardRow {
  const T *dy, *x, *second_dy, *dsum;
  float inv_rms;
};
template <typename T>
struct Weights {
  const T *first, *second;
};
/// Tokens whose shares of the weights' gradients are added before they go to memory.
constexpr int64_t kTogether = 4;

/// sums[d] += share[d] of a pair; its elements stay in the pair's order until put_in_order.
template <typename V, typename T>
DSV3_INLINE void add_share(float* sums, detail::WholePair<V> count, const detail::Pair<V>& share) {
  detail::Pair<V> sum;
  detail::load_pair<V>(sums, count, sum);
  sum.a += share.a;
  sum.b += share.b;
  detail::store_pair<V>(sums, count, sum);
}
/// The same at the end of a row, in order.
template <typename V, typename T>
DSV3_INLINE void add_share(float* sums, int64_t count, const detail::Pair<V>& share) {
  float pair[V::kPair];
  detail::store_pair<V>(pair, detail::WholePair<V>{}, share);
  for (int64_t i = 0; i < V::kPair; ++i) {
    const int64_t at = detail::place_in_pair<V, T>(i);
    if (at < count) sums[at] += pair[i];
  }
}

/// dots[t] = Σ g · x with g = dy·weight (of both norms where kSecond), and where kShares the
/// tokens' shares of the weights' gradients: added to sums [D], [2, D] with a second norm.
template <typename V, bool kSecond, bool kShares, int64_t kTokens, typename T>
DSV3_INLINE void dots_and_shares(const BackwardRow<T>* rows, const Weights<T>& weights,
                                 int64_t size, float* sums, float* dots) {
  using Pair = detail::Pair<V>;
  constexpr int64_t kPart = 1024;  // sums of few terms round less
  for (int64_t t = 0; t < kTokens; ++t) dots[t] = 0.0f;
  for (int64_t first = 0; first < size; first += kPart) {
    Pair dot[kTokens] = {};
    detail::for_each_pair<V>(
        std::min(kPart, size - first), [&](int64_t i, auto count) __attribute__((always_inline)) {
          const int64_t at = first + i;
          Pair w, second_w, share = {}, second_share = {};
          detail::load_pair<V>(weights.first + at, count, w);
          if constexpr (kSecond) detail::load_pair<V>(weights.second + at, count, second_w);
#pragma GCC unroll 4
          for (int64_t t = 0; t < kTokens; ++t) {
            Pair g, x, normed;
            detail::load_pair<V>(rows[t].dy + at, count, g);
            detail::load_pair<V>(rows[t].x + at, count, x);
            normed.a = x.a * rows[t].inv_rms;
            normed.b = x.b * rows[t].inv_rms;
            if constexpr (kShares) {
              share.a += g.a * normed.a;
              share.b += g.b * normed.b;
            }
            g.a *= w.a;
            g.b *= w.b;
            if constexpr (kSecond) {
              Pair s;
              detail::load_pair<V>(rows[t].second_dy + at, count, s);
              second_share.a += s.a * normed.a;
              second_share.b += s.b * normed.b;
              g.a += s.a * second_w.a;
              g.b += s.b * second_w.b;
            }
            dot[t].a += g.a * x.a;
            dot[t].b += g.b * x.b;
          }
          if constexpr (kShares) add_share<V, T>(sums + at, count, share);
          if constexpr (kShares && kSecond) add_share<V, T>(sums + size + at, count, second_share);
        });
    for (int64_t t = 0; t < kTokens; ++t) dots[t] += detail::sum_of<V>(dot[t].a + dot[t].b);
  }
}

/// dx of a token; asks for the rows of the token kTogether further on.
template <typename V, bool kSecond, bool kSum, typename T>
DSV3_INLINE void write_dx(const BackwardRow<T>& row, const Weights<T>& weights, float slope,
                          int64_t size, int64_t x_stride, bool streamed, T* dx) {
  using Pair = detail::Pair<V>;
  detail::write_row<V>(
      dx, size, streamed, [&](int64_t first, int64_t last, T * out) __attribute__((always_inline)) {
        detail::for_each_pair<V>(
            last - first, [&](int64_t i, auto count) __attribute__((always_inline)) {
              const int64_t at = first + i;
              Pair g, x, w;
              detail::load_pair<V>(row.dy + at, count, g);
              detail::load_pair<V>(row.x + at, count, x);
              detail::load_pair<V>(weights.first + at, count, w);
              detail::prefetch_pair<V>(row.dy + kTogether * size + at);
              detail::prefetch_pair<V>(row.x + kTogether * x_stride + at);
              if constexpr (kSecond) {
                detail::prefetch_pair<V>(row.second_dy + kTogether * size + at);
              }
              if constexpr (kSum) detail::prefetch_pair<V>(row.dsum + kTogether * size + at);
              g.a *= w.a;
              g.b *= w.b;
              if constexpr (kSecond) {
                Pair s;
                detail::load_pair<V>(row.second_dy + at, count, s);
                detail::load_pair<V>(weights.second + at, count, w);
                g.a += s.a * w.a;
                g.b += s.b * w.b;
              }
              g.a = g.a * row.inv_rms - x.a * slope;
              g.b = g.b * row.inv_rms - x.b * slope;
              if constexpr (kSum) {
                detail::load_pair<V>(row.dsum + at, count, x);
                g.a += x.a;
                g.b += x.b;
              }
              detail::store_pair<V>(out + i, count, g);
            });
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

/// Where a block's tokens leave their shares of the weights' gradients: [D] each, [2, D] with a
/// second norm.
struct WeightSums {
  float* partial = nullptr;  // the block's; null = not wanted
  float* share = nullptr;    // of kRowsPerShare tokens at a time; null: the block has few
};

/// kTokens tokens from t on.
template <typename V, bool kSecond, int64_t kTokens, typename T>
DSV3_INLINE void backward_tokens(const RmsNormBackward& p, int64_t t, bool streamed, float* sums) {
  const int64_t D = p.hidden;
  const auto at = [&](const void* rows, int64_t token, int64_t stride) {
    return rows != nullptr ? static_cast<const T*>(rows) + token * stride : nullptr;
  };
  const Weights<T> weights{at(p.weight, 0, 0), at(p.second_weight, 0, 0)};
  BackwardRow<T> rows[kTokens];
  float dots[kTokens];
  for (int64_t i = 0; i < kTokens; ++i) {
    rows[i] = {at(p.dy, t + i, D), at(p.x, t + i, p.x_stride), at(p.second_dy, t + i, D),
               at(p.dsum, t + i, D), detail::usual_nan(p.inv_rms[t + i])};
  }
  if (sums != nullptr) {
    dots_and_shares<V, kSecond, true, kTokens>(rows, weights, D, sums, dots);
  } else {
    dots_and_shares<V, kSecond, false, kTokens>(rows, weights, D, sums, dots);
  }
  for (int64_t i = 0; i < kTokens; ++i) {
    const float r = rows[i].inv_rms, slope = dots[i] * r * r * r / static_cast<float>(D);
    T* const dx = static_cast<T*>(p.dx) + (t + i) * D;
    if (p.dsum != nullptr) {
      write_dx<V, kSecond, true>(rows[i], weights, slope, D, p.x_stride, streamed, dx);
    } else {
      write_dx<V, kSecond, false>(rows[i], weights, slope, D, p.x_stride, streamed, dx);
    }
  }
}

/// Elements in a pair's order → in their own.
template <typename V, typename T>
DSV3_INLINE void put_in_order(float* x, int64_t size) {
  if constexpr (std::is_same_v<T, float>) return;
  for (int64_t i = 0; i + V::kPair <= size; i += V::kPair) {
    float pair[V::kPair];
    std::copy_n(x + i, V::kPair, pair);
    for (int64_t j = 0; j < V::kPair; ++j) x[i + detail::place_in_pair<V, T>(j)] = pair[j];
  }
}

template <typename V, bool kSecond, typename T>
DSV3_INLINE void backward_body(const RmsNormBackward& p, int64_t begin, int64_t end, bool streamed,
                               const WeightSums& sums) {
  const int64_t D = p.hidden;
  const int64_t size = kSecond ? 2 * D : D;
  float* const sum = sums.share != nullptr ? sums.share : sums.partial;
  if (sums.partial != nullptr) std::fill_n(sums.partial, size, 0.0f);
  if (sums.share != nullptr) std::fill_n(sums.share, size, 0.0f);
  static_assert(kRowsPerShare % kTogether == 0);
  for (int64_t t = begin; t < end;) {
    if (t + kTogether <= end) {
      backward_tokens<V, kSecond, kTogether, T>(p, t, streamed, sum);
      t += kTogether;
    } else {
      backward_tokens<V, kSecond, 1, T>(p, t, streamed, sum);
      t += 1;
    }
    if (sums.share != nullptr && ((t - begin) % kRowsPerShare == 0 || t == end)) {
      join_share(sums.share, size, sums.partial);
    }
  }
  if (sums.partial != nullptr) {
    put_in_order<V, T>(sums.partial, D);
    if constexpr (kSecond) put_in_order<V, T>(sums.partial + D, D);
  }
  detail::stream_fence();
}

DSV3_WIDE(void backward_rows,
          (const RmsNormBackward& p, const float*, int64_t begin, int64_t end, bool streamed,
           const WeightSums& sums),
          p.second_dy != nullptr ? backward_body<V, true, float>(p, begin, end, streamed, sums)
                                 : backward_body<V, false, float>(p, begin, end, streamed, sums))
DSV3_WIDE(void backward_rows,
          (const RmsNormBackward& p, const BFloat16*, int64_t begin, int64_t end, bool streamed,
           const WeightSums& sums),
          p.second_dy != nullptr ? backward_body<V, true, BFloat16>(p, begin, end, streamed, sums)
                                 : backward_body<V, false, BFloat16>(p, begin, end, streamed, sums))

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

void rms_norm_backward(const RmsNormBackward& p) {
  const int64_t row_bytes = p.hidden * size_of(p.dtype);
  const bool streamed = p.num_tokens * row_bytes >= detail::kStreamedBytes;
  const bool weights = p.dweight != nullptr || p.second_dweight != nullptr;
  detail::dispatch_float("rms_norm_backward", p.dtype, [&](auto* type) {
    if (!weights) {
      // Cut so that the same tokens are taken together whatever the number of threads.
      const int64_t groups = (p.num_tokens + kTogether - 1) / kTogether;
      detail::parallel_rows(groups, kTogether * 4 * row_bytes, [&](int64_t begin, int64_t end) {
        backward_rows(p, type, begin * kTogether, std::min(end * kTogether, p.num_tokens), streamed,
                      {});
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
