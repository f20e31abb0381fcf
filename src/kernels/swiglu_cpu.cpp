// SwiGLU on the host: threads over rows (128×128 tiles where FP8 is wanted), a vector exponential
// inside. Large results are written past the caches. With and without FP8 forms the same functions
// of a pair make the same bits.
#include "kernels/detail/cpu.h"
#include "kernels/detail/fp8_cpu.h"
#include "kernels/detail/streaming.h"
#include "kernels/elementwise.h"

namespace dsv3::kernels {

int64_t swiglu_backward_scratch(int64_t num_tokens, int64_t intermediate) {
  return (intermediate + kFp8Tile - 1) / kFp8Tile * num_tokens + 1;
}

namespace cpu {
namespace {

using detail::Fp8TileRow;

/// The smaller of x and `bound` ≥ 0: their bits as integers order as they do. NaN may give `bound`.
template <typename V>
DSV3_INLINE void at_most(const typename V::Floats& x, float bound, typename V::Floats& out) {
  using Signed = typename V::Signed;
  const auto bits = reinterpret_cast<Signed>(x);
  const Signed top = Signed{} + std::bit_cast<int32_t>(bound);
  const Signed least = bits < top ? bits : top;
  out = reinterpret_cast<typename V::Floats>(least);
}

/// 2^f for |f| ≤ 1/2, minimax: 7.5e-8 off where kFine, else 3e-6.
template <typename V, bool kFine>
DSV3_INLINE void power_of_two(const typename V::Floats& f, typename V::Floats& out) {
  if constexpr (kFine) {
    out = 0x1.5c08e6p-10f * f + 0x1.3d0c52p-7f;
    out = out * f + 0x1.c6b6e4p-5f;
    out = out * f + 0x1.ebf918p-3f;
    out = out * f + 0x1.62e428p-1f;
    out = out * f + 0x1.000002p+0f;
  } else {
    out = 0x1.3997d6p-7f * f + 0x1.ca1440p-5f;
    out = out * f + 0x1.ec06dap-3f;
    out = out * f + 0x1.62e0dcp-1f;
    out = out * f + 0x1.ffffe8p-1f;
  }
}

/// 1 / d for d ≥ 1, 7.6e-8 off where kFine, else 7e-6: from a line through its logarithm, 5% off,
/// by the terms of 1 / (1 - error). A division takes longer than all else in a sigmoid.
template <typename V, bool kFine>
DSV3_INLINE void reciprocal(const typename V::Floats& d, typename V::Floats& out) {
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  const auto line = reinterpret_cast<Floats>(0x7ef31200u - reinterpret_cast<Ints>(d));
  const Floats error = 1.0f - d * line;
  if constexpr (kFine) {
    const Floats three = line * (error * error + error) + line;
    out = three * (1.0f - d * three) + three;  // a step of Newton's: 1 for d = 1
  } else {
    const Floats two = line * error + line;
    out = two * (error * error) + two;
  }
}

/// 1 / (1 + e^-x), zero below -87, for what is rounded to BF16 after it: 3e-7 off where kFine,
/// which sums in FP32 ask for, else 1e-5. Far below 0, where it is small itself, up to 4e-6 of it.
template <typename V, bool kFine>
DSV3_INLINE void sigmoid(const BFloat16*, const typename V::Floats& x, typename V::Floats& out) {
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  Floats top, power, inverse;
  at_most<V>(x, 87.0f, top);
  constexpr float kSlope = -1.44269504f;
  const Floats shifted = top * kSlope + 12582912.0f;  // an integer n in the low bits
  power_of_two<V, kFine>(top * kSlope - (shifted - 12582912.0f), power);
  const auto e = reinterpret_cast<Floats>(reinterpret_cast<Ints>(power) +
                                          (reinterpret_cast<Ints>(shifted) << 23));
  reciprocal<V, kFine>(1.0f + e, inverse);
  out = x < -87.0f ? Floats{} : inverse;
}

/// 1 + e^-x to about 1 ulp, infinity below x = -88 (where silu is under 1e-36): exp_fast without
/// what the addition of 1 makes needless. NaN may become any number: x is multiplied in afterwards.
template <typename V>
DSV3_INLINE void one_plus_exp(const typename V::Floats& x, typename V::Floats& out) {
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  Floats top;
  at_most<V>(x, 86.0f, top);
  const Floats shifted = top * -1.44269504f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = (-top - n * 0.693359375f) + n * 2.12194440e-4f;
  // Minimax for |r| ≤ ln(2)/2, the first two terms exact: 3e-9 off, far less than its rounding.
  Floats p = 0x1.6a23cep-10f * r + 0x1.123a20p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // p is in [0.7, 1.5] and n in [-124, 127]: n goes straight into the exponent.
  const Ints e = reinterpret_cast<Ints>(p) + (reinterpret_cast<Ints>(shifted) << 23);
  out = x < -88.0f ? Floats{} + __builtin_inff() : 1.0f + reinterpret_cast<Floats>(e);
}
template <typename V, bool kFine>
DSV3_INLINE void sigmoid(const float*, const typename V::Floats& x, typename V::Floats& out) {
  typename V::Floats d;
  one_plus_exp<V>(x, d);
  out = 1.0f / d;
}

template <typename V>
DSV3_INLINE void silu(const BFloat16* type, const typename V::Floats& x, typename V::Floats& out) {
  typename V::Floats s;
  sigmoid<V, false>(type, x, s);
  out = x * s;
}
template <typename V>
DSV3_INLINE void silu(const float*, const typename V::Floats& x, typename V::Floats& out) {
  typename V::Floats d;
  one_plus_exp<V>(x, d);
  out = x / d;
}

/// y of `count` elements at `gate` and `up`.
template <typename V, typename T, typename Count>
DSV3_INLINE void forward_pair(const T* gate, const T* up, Count count, float weight, T* y) {
  detail::Pair<V> g, u, s;
  detail::load_pair<V>(gate, count, g);
  detail::load_pair<V>(up, count, u);
  silu<V>(y, g.a, s.a);
  silu<V>(y, g.b, s.b);
  s.a *= u.a * weight;
  s.b *= u.b * weight;
  detail::store_pair<V>(y, count, s);
}

/// Where a row's gradients come from.
template <typename T>
struct GradientRow {
  const T *gate, *up, *dy;
  float weight;
};

template <typename V, typename T>
DSV3_INLINE void gradient(const T* type, float weight, const typename V::Floats& g,
                          const typename V::Floats& u, const typename V::Floats& dy,
                          typename V::Floats& dgate, typename V::Floats& dup,
                          typename V::Floats& share) {
  using Floats = typename V::Floats;
  Floats s;
  sigmoid<V, true>(type, g, s);
  const Floats silu = g * s, d = dy * weight;
  dgate = d * u * (s + silu * (1.0f - s));
  dup = d * silu;
  share = dy * u * silu;
}

/// dgate and dup of `count` elements from i on; `share` takes their parts of the weight's gradient.
template <typename V, typename T, typename Count>
DSV3_INLINE void backward_pair(const GradientRow<T>& row, int64_t i, Count count, T* dgate, T* dup,
                               detail::Pair<V>& share) {
  detail::Pair<V> g, u, dy, dg, du;
  detail::load_pair<V>(row.gate + i, count, g);
  detail::load_pair<V>(row.up + i, count, u);
  detail::load_pair<V>(row.dy + i, count, dy);
  gradient<V>(row.gate, row.weight, g.a, u.a, dy.a, dg.a, du.a, share.a);
  gradient<V>(row.gate, row.weight, g.b, u.b, dy.b, dg.b, du.b, share.b);
  detail::store_pair<V>(dgate, count, dg);
  detail::store_pair<V>(dup, count, du);
}

DSV3_INLINE float weight_of(const float* row_weight, int64_t t) {
  return row_weight != nullptr ? detail::usual_nan(row_weight[t]) : 1.0f;
}

template <typename V, typename T>
DSV3_INLINE void forward_body(const SwigluForward& p, int64_t begin, int64_t end, bool streamed) {
  const int64_t I = p.intermediate;
  for (int64_t t = begin; t < end; ++t) {
    const T* gate = static_cast<const T*>(p.gate_up) + t * 2 * I;
    const T* up = gate + I;
    const float weight = weight_of(p.row_weight, t);
    detail::write_row<V>(
        static_cast<T*>(p.y) + t * I, I,
        streamed, [&](int64_t first, int64_t last, T * out) __attribute__((always_inline)) {
          const int64_t ahead = last < I ? detail::kStaged : 2 * I - first;
          detail::for_each_pair<V>(
              last - first, [&](int64_t i, auto count) __attribute__((always_inline)) {
                detail::prefetch_pair<V>(gate + first + i + ahead);
                detail::prefetch_pair<V>(up + first + i + ahead);
                forward_pair<V>(gate + first + i, up + first + i, count, weight, out + i);
              });
        });
  }
  detail::stream_fence();
}

/// A part of a row that is ready.
template <typename V, typename T>
DSV3_INLINE void put_row(const T* row, int64_t columns, bool streamed, T* y) {
  detail::put_bytes<V>(y, row, columns * static_cast<int64_t>(sizeof(T)), streamed);
}

template <typename V, typename T>
DSV3_INLINE void backward_body(const SwigluBackward& p, int64_t begin, int64_t end, bool streamed) {
  const int64_t I = p.intermediate;
  for (int64_t t = begin; t < end; ++t) {
    const T* const gate = static_cast<const T*>(p.gate_up) + t * 2 * I;
    const T* const dy = static_cast<const T*>(p.dy) + t * I;
    T* const dgate = static_cast<T*>(p.dgate_up) + t * 2 * I;
    float share = 0.0f;
    // Note: dgate may be gate. Both halves of a part are read before either is written.
    for (int64_t first = 0; first < I; first += detail::kStaged) {
      const int64_t size = std::min(detail::kStaged, I - first);
      const bool last = first + size == I;
      detail::Room<T, detail::kStaged> halves[2];
      const int64_t ahead = last ? 2 * I - first : detail::kStaged;
      const int64_t dy_ahead = last ? I - first : detail::kStaged;
      const GradientRow<T> row{gate + first, gate + I + first, dy + first,
                               weight_of(p.row_weight, t)};
      const auto pair = [&](int64_t i, auto count, detail::Pair<V>& part)
          __attribute__((always_inline)) {
        detail::prefetch_pair<V>(row.gate + i + ahead);
        detail::prefetch_pair<V>(row.up + i + ahead);
        detail::prefetch_pair<V>(row.dy + i + dy_ahead);
        backward_pair<V>(row, i, count, halves[0].data() + i, halves[1].data() + i, part);
      };
      if (p.drow_weight != nullptr) {
        share += detail::PairSum<V>::of(size, pair);
      } else {
        detail::for_each_pair<V>(
            size, [&](int64_t i, auto count) __attribute__((always_inline)) {
              detail::Pair<V> unwanted;
              pair(i, count, unwanted);
            });
      }
      put_row<V>(halves[0].data(), size, streamed, dgate + first);
      put_row<V>(halves[1].data(), size, streamed, dgate + I + first);
    }
    if (p.drow_weight != nullptr) p.drow_weight[t] = share;
  }
  detail::stream_fence();
}

/// The forms that are wanted of a tile of a matrix of `num_rows` rows; asks for next[0] with the
/// rows and for next[1] with the columns.
template <typename T>
DSV3_INLINE void emit(Fp8TileRow<T>* tile, const Fp8Rows& rows, const Fp8Columns& columns,
                      const ScaleRule& rule, detail::Fp8Place at, int64_t num_rows,
                      const detail::NextRows (&next)[2]) {
  const int64_t exist = std::min(kFp8Tile, num_rows - at.row0);
  if (rows.data != nullptr) {
    at.next = next[0];
    detail::emit_rows(tile, rows, rule, at, exist);
  }
  if (columns.data == nullptr) return;
  at.next = next[1];
  for (int64_t r = exist; r < kFp8Tile; ++r) std::fill_n(tile[r], kFp8Tile, T{});
  detail::emit_columns(tile, columns, rule, at, (num_rows + kFp8Tile - 1) / kFp8Tile * kFp8Tile);
}

/// Tiles [begin, end) in the order of rows, then columns.
template <typename V, typename T>
DSV3_INLINE void forward_tiles_body(const SwigluForward& p, int64_t begin, int64_t end,
                                    bool streamed) {
  alignas(64) Fp8TileRow<T> tile[kFp8Tile];
  const int64_t I = p.intermediate, across = (I + kFp8Tile - 1) / kFp8Tile;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row0 = n / across * kFp8Tile, column0 = n % across * kFp8Tile;
    const int64_t columns = std::min(kFp8Tile, I - column0);
    for (int64_t t = row0; t < std::min(row0 + kFp8Tile, p.num_tokens); ++t) {
      const T* const gate = static_cast<const T*>(p.gate_up) + t * 2 * I + column0;
      const float weight = weight_of(p.row_weight, t);
      T* const row = tile[t - row0];
      detail::for_each_pair<V>(
          columns, [&](int64_t c, auto count) __attribute__((always_inline)) {
            forward_pair<V>(gate + c, gate + I + c, count, weight, row + c);
          });
      for (int64_t c = columns; c < kFp8Tile; ++c) row[c] = {};
      if (p.y != nullptr)
        put_row<V>(row, columns, streamed, static_cast<T*>(p.y) + t * I + column0);
    }
    const T* const rows = static_cast<const T*>(p.gate_up) + row0 * 2 * I;
    emit(tile, p.rows, p.columns, p.rule, {row0, column0, I, streamed}, p.num_tokens,
         {detail::NextRows::of(rows, 2 * I, n % across, across),
          detail::NextRows::of(rows + I, 2 * I, n % across, across)});
  }
  detail::stream_fence();
}

/// The intermediate size is a multiple of 128.
template <typename V, typename T>
DSV3_INLINE void backward_tiles_body(const SwigluBackward& p, int64_t begin, int64_t end,
                                     bool streamed) {
  alignas(64) Fp8TileRow<T> tiles[2][kFp8Tile];
  const int64_t I = p.intermediate, across = I / kFp8Tile;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row0 = n / across * kFp8Tile, column0 = n % across * kFp8Tile;
    for (int64_t t = row0; t < std::min(row0 + kFp8Tile, p.num_tokens); ++t) {
      const T* const gate = static_cast<const T*>(p.gate_up) + t * 2 * I + column0;
      const GradientRow<T> row{gate, gate + I, static_cast<const T*>(p.dy) + t * I + column0,
                               weight_of(p.row_weight, t)};
      T* const dgate = tiles[0][t - row0];
      T* const dup = tiles[1][t - row0];
      const float share = detail::PairSum<V>::of(
          kFp8Tile, [&](int64_t i, auto count, detail::Pair<V>& part)
                        __attribute__((always_inline)) {
                          backward_pair<V>(row, i, count, dgate + i, dup + i, part);
                        });
      if (p.drow_weight != nullptr) p.scratch[column0 / kFp8Tile * p.num_tokens + t] = share;
      if (p.dgate_up != nullptr) {
        T* to = static_cast<T*>(p.dgate_up) + t * 2 * I + column0;
        put_row<V>(dgate, kFp8Tile, streamed, to);
        put_row<V>(dup, kFp8Tile, streamed, to + I);
      }
    }
    const T* const rows = static_cast<const T*>(p.gate_up) + row0 * 2 * I;
    const T* const dy = static_cast<const T*>(p.dy) + row0 * I;
    const detail::NextRows next[2][2] = {
        {detail::NextRows::of(rows, 2 * I, n % across, across),
         detail::NextRows::of(rows + I, 2 * I, n % across, across)},
        {detail::NextRows::of(dy, I, n % across, across), {}}};
    for (int64_t half = 0; half < 2; ++half) {
      const detail::Fp8Place at{row0, half * I + column0, 2 * I, streamed};
      emit(tiles[half], p.rows, p.columns, p.rule, at, p.num_tokens, next[half]);
    }
  }
  detail::stream_fence();
}

DSV3_WIDE(void forward_rows,
          (const SwigluForward& p, const float*, int64_t begin, int64_t end, bool streamed),
          forward_body<V, float>(p, begin, end, streamed))
DSV3_WIDE(void forward_rows,
          (const SwigluForward& p, const BFloat16*, int64_t begin, int64_t end, bool streamed),
          forward_body<V, BFloat16>(p, begin, end, streamed))
DSV3_WIDE(void backward_rows,
          (const SwigluBackward& p, const float*, int64_t begin, int64_t end, bool streamed),
          backward_body<V, float>(p, begin, end, streamed))
DSV3_WIDE(void backward_rows,
          (const SwigluBackward& p, const BFloat16*, int64_t begin, int64_t end, bool streamed),
          backward_body<V, BFloat16>(p, begin, end, streamed))
DSV3_WIDE(void forward_tiles,
          (const SwigluForward& p, const float*, int64_t begin, int64_t end, bool streamed),
          forward_tiles_body<V, float>(p, begin, end, streamed))
DSV3_WIDE(void forward_tiles,
          (const SwigluForward& p, const BFloat16*, int64_t begin, int64_t end, bool streamed),
          forward_tiles_body<V, BFloat16>(p, begin, end, streamed))
DSV3_WIDE(void backward_tiles,
          (const SwigluBackward& p, const float*, int64_t begin, int64_t end, bool streamed),
          backward_tiles_body<V, float>(p, begin, end, streamed))
DSV3_WIDE(void backward_tiles,
          (const SwigluBackward& p, const BFloat16*, int64_t begin, int64_t end, bool streamed),
          backward_tiles_body<V, BFloat16>(p, begin, end, streamed))

int64_t tiles_of(int64_t size) {
  return (size + kFp8Tile - 1) / kFp8Tile;
}

}  // namespace

void swiglu_forward(const SwigluForward& p) {
  const int64_t row_bytes = p.intermediate * size_of(p.dtype);
  const bool tiled = p.rows.data != nullptr || p.columns.data != nullptr;
  const bool streamed = p.num_tokens * row_bytes >= detail::kStreamedBytes;
  detail::dispatch_float("swiglu", p.dtype, [&](auto* type) {
    if (tiled) {
      detail::parallel_rows(
          tiles_of(p.num_tokens) * tiles_of(p.intermediate),
          kFp8Tile * kFp8Tile * 3 * size_of(p.dtype),
          [&](int64_t begin, int64_t end) { forward_tiles(p, type, begin, end, streamed); });
      return;
    }
    detail::parallel_rows(p.num_tokens, 3 * row_bytes, [&](int64_t begin, int64_t end) {
      forward_rows(p, type, begin, end, streamed);
    });
  });
}

void swiglu_backward(const SwigluBackward& p) {
  const int64_t row_bytes = p.intermediate * size_of(p.dtype);
  const bool tiled = p.rows.data != nullptr || p.columns.data != nullptr;
  require(!tiled || p.intermediate % kFp8Tile == 0,
          "[swiglu_backward] intermediate: FP8 gradients need a multiple of 128, got {}",
          p.intermediate);
  const bool streamed = 2 * p.num_tokens * row_bytes >= detail::kStreamedBytes;
  detail::dispatch_float("swiglu_backward", p.dtype, [&](auto* type) {
    if (!tiled) {
      detail::parallel_rows(p.num_tokens, 5 * row_bytes, [&](int64_t begin, int64_t end) {
        backward_rows(p, type, begin, end, streamed);
      });
      return;
    }
    const int64_t across = tiles_of(p.intermediate);
    detail::parallel_rows(
        tiles_of(p.num_tokens) * across, kFp8Tile * kFp8Tile * 5 * size_of(p.dtype),
        [&](int64_t begin, int64_t end) { backward_tiles(p, type, begin, end, streamed); });
    for (int64_t t = 0; p.drow_weight != nullptr && t < p.num_tokens; ++t) {
      float sum = 0.0f;
      for (int64_t i = 0; i < across; ++i) sum += p.scratch[i * p.num_tokens + t];
      p.drow_weight[t] = sum;
    }
  });
}

}  // namespace cpu
}  // namespace dsv3::kernels
