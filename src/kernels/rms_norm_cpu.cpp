// RMSNorm on the host: threads over rows, a few passes over a row that stays in the first cache
// levels; large results are written past the caches.
#include <cmath>

#include "kernels/detail/cpu.h"
#include "kernels/detail/fp8_cpu.h"
#include "kernels/detail/streaming.h"
#include "kernels/elementwise.h"

namespace dsv3::kernels::cpu {
namespace {

/// Bytes that memory is asked for ahead of time, where a row is shorter.
constexpr int64_t kAhead = 8192;
/// Elements of a row that a thread keeps while it is normalised.
constexpr int64_t kKeptRow = 8192;
/// Elements of a row that are quantised at once: sixteen tiles.
constexpr int64_t kQuantized = 16 * kFp8Tile;

/// out = x + residual; asks for the next row of the residual.
template <typename V, typename T>
DSV3_INLINE void add_row(const T* x, const T* residual, int64_t size, T* out) {
  detail::for_each_pair<V>(
      size, [&](int64_t i, auto count) __attribute__((always_inline)) {
        detail::Pair<V> v, r;
        detail::load_pair<V>(x + i, count, v);
        detail::load_pair<V>(residual + i, count, r);
        detail::prefetch_pair<V>(residual + size + i);
        v.a += r.a;
        v.b += r.b;
        detail::store_pair<V>(out + i, count, v);
      });
}

/// out = x · weight / rms. Asks for as much from `next` on, evenly: a burst would wait for itself.
template <typename V, typename T>
DSV3_INLINE void normalise(const T* x, const T* weight, float inv_rms, int64_t size, const T* next,
                           T* out) {
  detail::for_each_pair<V>(
      size, [&](int64_t i, auto count) __attribute__((always_inline)) {
        detail::Pair<V> v, w;
        detail::load_pair<V>(x + i, count, v);
        detail::load_pair<V>(weight + i, count, w);
        detail::prefetch_pair<V>(next + i);
        v.a *= w.a * inv_rms;
        v.b *= w.b * inv_rms;
        detail::store_pair<V>(out + i, count, v);
      });
}

template <typename V, typename T>
DSV3_INLINE void scale_row(const T* x, const T* weight, float inv_rms, int64_t size, bool streamed,
                           const T* next, T* y) {
  detail::write_row<V>(
      y, size, streamed, [&](int64_t first, int64_t last, T * out) __attribute__((always_inline)) {
        normalise<V>(x + first, weight + first, inv_rms, last - first, next + first, out);
      });
}

template <typename V, typename T>
DSV3_INLINE void quantize_row(const RmsNormForward& p, int64_t t, const T* x, float inv_rms,
                              bool streamed, const T* next) {
  for (int64_t first = 0; first < p.hidden; first += kQuantized) {
    const int64_t size = std::min(kQuantized, p.hidden - first);
    detail::Room<T, kQuantized> room;
    T* const part = room.data();
    normalise<V>(x + first, static_cast<const T*>(p.weight) + first, inv_rms, size, next + first,
                 part);
    float* scales = p.quantized.scales + first / kFp8Tile * p.quantized.scale_stride + t;
    uint8_t* to = p.quantized.data + t * p.hidden + first;
    if (!streamed) {
      detail::encode_row_tiles(part, size, p.rule, to, scales, p.quantized.scale_stride);
      continue;
    }
    alignas(64) uint8_t codes[kQuantized];
    detail::encode_row_tiles(part, size, p.rule, codes, scales, p.quantized.scale_stride);
    detail::stream_bytes<V>(to, codes, size);
  }
}

template <typename V, typename T>
DSV3_INLINE float inverse_rms(const T* x, int64_t size, float eps) {
  const float sum = detail::PairSum<V>::of(
      size, [&](int64_t i, auto count, detail::Pair<V>& v) __attribute__((always_inline)) {
        detail::load_pair<V>(x + i, count, v);
        v.a *= v.a;
        v.b *= v.b;
      });
  return 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
}

template <typename V, typename T>
DSV3_INLINE void forward_body(const RmsNormForward& p, int64_t begin, int64_t end, bool streamed) {
  const int64_t D = p.hidden;
  const int64_t ahead = std::max<int64_t>(1, kAhead / (D * static_cast<int64_t>(sizeof(T)) + 1));
  detail::Room<T, kKeptRow> kept;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(p.x) + t * p.x_stride;
    const T* next = x + ahead * p.x_stride;  // asked for while this row is written
    if (p.residual != nullptr) {
      T* sum = static_cast<T*>(p.sum) + t * D;
      // A streamed row is read again from here.
      T* to = streamed && D <= kKeptRow ? kept.data() : sum;
      add_row<V>(x, static_cast<const T*>(p.residual) + t * D, D, to);
      if (to != sum) detail::stream_bytes<V>(sum, to, D * static_cast<int64_t>(sizeof(T)));
      x = to;
    }
    const float inv_rms =
        p.inv_rms_given ? detail::usual_nan(p.inv_rms[t]) : inverse_rms<V>(x, D, p.eps);
    if (!p.inv_rms_given && p.inv_rms != nullptr) p.inv_rms[t] = inv_rms;
    if (p.y != nullptr) {
      scale_row<V>(x, static_cast<const T*>(p.weight), inv_rms, D, streamed, next,
                   static_cast<T*>(p.y) + t * D);
    }
    if (p.second_weight != nullptr) {
      scale_row<V>(x, static_cast<const T*>(p.second_weight), inv_rms, D, streamed, next,
                   static_cast<T*>(p.second_y) + t * D);
    }
    if (p.quantized.data != nullptr) quantize_row<V>(p, t, x, inv_rms, streamed, next);
  }
  detail::stream_fence();
}

DSV3_WIDE(void forward_rows,
          (const RmsNormForward& p, const float*, int64_t begin, int64_t end, bool streamed),
          forward_body<V, float>(p, begin, end, streamed))
DSV3_WIDE(void forward_rows,
          (const RmsNormForward& p, const BFloat16*, int64_t begin, int64_t end, bool streamed),
          forward_body<V, BFloat16>(p, begin, end, streamed))

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

}  // namespace dsv3::kernels::cpu
