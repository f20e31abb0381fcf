// SwiGLU on the host: threads over rows (128×128 tiles where FP8 is wanted), a vector exponential
// inside. Large results are written past the caches. Both ways have the same
// bits, because they share the functions of one number.
#include "kernels/detail/cpu.h"
#include "kernels/detail/fp8_cpu.h"
#include "kernels/detail/lanes.h"
#include "kernels/detail/streaming.h"
#include "kernels/elementwise.h"

namespace dsv3::kernels {

int64_t swiglu_backward_scratch(int64_t num_tokens, int64_t intermediate) {
  return (intermediate + kFp8Tile - 1) / kFp8Tile * num_tokens + 1;
}

namespace cpu {
namespace {

using detail::Fp8TileRow;

/// 1 + e^-x to about 1 ulp, infinity below x = -88 (where silu is under 1e-36): exp_fast without
/// what the addition of 1 makes needless. NaN may become any number: x is multiplied in afterwards.
DSV3_INLINE float one_plus_exp(float x) {
  const float y = -x < -86.0f ? -86.0f : -x;
  const float clamped = y > 88.0f ? 88.0f : y;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // an integer n in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  // Minimax for |r| ≤ ln(2)/2, the first two terms exact: 3e-9 off, far less than its rounding.
  float p = 0x1.6a23cep-10f;
  p = p * r + 0x1.123a20p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // p is in [0.7, 1.5] and n in [-124, 127]: n goes straight into the exponent.
  const float e =
      std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23));
  return y > 88.0f ? __builtin_inff() : 1.0f + e;
}

DSV3_INLINE float value(float gate, float up, float weight) {
  return gate / one_plus_exp(gate) * up * weight;
}

struct Gradients {
  float gate, up, share;  // share: of the row weight's gradient
};
DSV3_INLINE Gradients gradients(float g, float u, float dy, float weight) {
  const float sigmoid = 1.0f / one_plus_exp(g);
  const float silu = g * sigmoid, d = dy * weight;
  return {d * u * (sigmoid + silu * (1.0f - sigmoid)), d * silu, silu * u * dy};
}

/// Of gate and up, the part after `done` elements of a row, or the next row's first.
template <typename T>
DSV3_INLINE void prefetch_part(const T* gate, const T* up, int64_t done, int64_t intermediate) {
  const int64_t next = done < intermediate ? done : 2 * intermediate;
  constexpr int64_t kBytes = detail::kStaged * static_cast<int64_t>(sizeof(T));
  detail::prefetch_bytes(gate + next, kBytes);
  detail::prefetch_bytes(up + next, kBytes);
}

template <typename T>
DSV3_INLINE void forward_body(const SwigluForward& p, int64_t begin, int64_t end, bool streamed) {
  const int64_t I = p.intermediate;
  for (int64_t t = begin; t < end; ++t) {
    const T* __restrict gate = static_cast<const T*>(p.gate_up) + t * 2 * I;
    const T* __restrict up = gate + I;
    const float weight = p.row_weight != nullptr ? p.row_weight[t] : 1.0f;
    detail::write_row(
        static_cast<T*>(p.y) + t * I, I, streamed,
        [&](int64_t first, int64_t last, T* __restrict out) __attribute__((always_inline)) {
          if (streamed) prefetch_part(gate, up, last, I);
#pragma omp simd
          for (int64_t i = first; i < last; ++i) {
            detail::store(&out[i - first],
                          value(detail::load(&gate[i]), detail::load(&up[i]), weight));
          }
        });
  }
  detail::stream_fence();
}

/// kShare: with the row weight's gradient.
template <typename T, bool kShare>
DSV3_INLINE void backward_body(const SwigluBackward& p, int64_t begin, int64_t end, bool streamed) {
  const int64_t I = p.intermediate;
  for (int64_t t = begin; t < end; ++t) {
    const T* gate = static_cast<const T*>(p.gate_up) + t * 2 * I;
    const T* dy = static_cast<const T*>(p.dy) + t * I;
    T* dgate = static_cast<T*>(p.dgate_up) + t * 2 * I;
    const float weight = p.row_weight != nullptr ? p.row_weight[t] : 1.0f;
    float share = 0.0f;
    // Note: dgate may be gate. Both halves of a part are read before either is written.
    for (int64_t first = 0; first < I; first += detail::kStaged) {
      const int64_t size = std::min(detail::kStaged, I - first);
      detail::Room<T, detail::kStaged> halves[2];
      T* const __restrict staged[2] = {halves[0].data(), halves[1].data()};
      alignas(64) float shares[detail::kStaged];
      if (streamed) {
        prefetch_part(gate, gate + I, first + size, I);
        detail::prefetch_bytes(dy + first + size, size * static_cast<int64_t>(sizeof(T)));
      }
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const Gradients d =
            gradients(detail::load(&gate[first + i]), detail::load(&gate[I + first + i]),
                      detail::load(&dy[first + i]), weight);
        detail::store(&staged[0][i], d.gate);
        detail::store(&staged[1][i], d.up);
        if constexpr (kShare) shares[i] = d.share;
      }
      if constexpr (kShare) share += detail::sum_row(shares, size);
      const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
      for (int64_t half = 0; half < 2; ++half) {
        T* to = dgate + half * I + first;
        if (streamed) {
          detail::stream_bytes(to, staged[half], bytes);
        } else {
          std::memcpy(to, staged[half], static_cast<size_t>(bytes));
        }
      }
    }
    if constexpr (kShare) p.drow_weight[t] = share;
  }
  detail::stream_fence();
}

/// A part of y that is ready.
template <typename T>
DSV3_INLINE void put_row(const T* row, int64_t columns, bool streamed, T* y) {
  const int64_t bytes = columns * static_cast<int64_t>(sizeof(T));
  if (streamed) {
    detail::stream_bytes(y, row, bytes);
  } else {
    std::memcpy(y, row, static_cast<size_t>(bytes));
  }
}

/// The forms that are wanted of a tile of a matrix of `num_rows` rows.
template <typename T>
DSV3_INLINE void emit(Fp8TileRow<T>* tile, const Fp8Rows& rows, const Fp8Columns& columns,
                      const ScaleRule& rule, const detail::Fp8Place& at, int64_t num_rows) {
  const int64_t exist = std::min(kFp8Tile, num_rows - at.row0);
  if (rows.data != nullptr) detail::emit_rows(tile, rows, rule, at, exist);
  if (columns.data == nullptr) return;
  for (int64_t r = exist; r < kFp8Tile; ++r) std::fill_n(tile[r], kFp8Tile, T{});
  detail::emit_columns(tile, columns, rule, at, (num_rows + kFp8Tile - 1) / kFp8Tile * kFp8Tile);
}

/// Tiles [begin, end) in the order of rows, then columns.
template <typename T>
DSV3_INLINE void forward_tiles_body(const SwigluForward& p, int64_t begin, int64_t end,
                                    bool streamed) {
  alignas(64) Fp8TileRow<T> tile[kFp8Tile];
  constexpr int64_t kRowBytes = sizeof(tile[0]);
  const int64_t I = p.intermediate, across = (I + kFp8Tile - 1) / kFp8Tile;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row0 = n / across * kFp8Tile, column0 = n % across * kFp8Tile;
    const int64_t columns = std::min(kFp8Tile, I - column0);
    // The next tile, asked for while this one is read.
    const int64_t ahead = column0 + kFp8Tile < I ? kFp8Tile : kFp8Tile * 2 * I - column0;
    for (int64_t t = row0; t < std::min(row0 + kFp8Tile, p.num_tokens); ++t) {
      const T* __restrict gate = static_cast<const T*>(p.gate_up) + t * 2 * I + column0;
      const float weight = p.row_weight != nullptr ? p.row_weight[t] : 1.0f;
      T* __restrict row = tile[t - row0];
      detail::prefetch_bytes(gate + ahead, kRowBytes);
      detail::prefetch_bytes(gate + I + ahead, kRowBytes);
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        detail::store(&row[c], value(detail::load(&gate[c]), detail::load(&gate[I + c]), weight));
      }
      for (int64_t c = columns; c < kFp8Tile; ++c) row[c] = {};
      if (p.y != nullptr) put_row(row, columns, streamed, static_cast<T*>(p.y) + t * I + column0);
    }
    emit(tile, p.rows, p.columns, p.rule, {row0, column0, I, streamed}, p.num_tokens);
  }
  detail::stream_fence();
}

/// The intermediate size is a multiple of 128.
template <typename T>
DSV3_INLINE void backward_tiles_body(const SwigluBackward& p, int64_t begin, int64_t end,
                                     bool streamed) {
  alignas(64) Fp8TileRow<T> tiles[2][kFp8Tile];
  constexpr int64_t kRowBytes = sizeof(tiles[0][0]);
  const int64_t I = p.intermediate, across = I / kFp8Tile;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row0 = n / across * kFp8Tile, column0 = n % across * kFp8Tile;
    const bool last = column0 + kFp8Tile == I;
    const int64_t columns = std::min(kFp8Tile, I - column0);  // 128, but GCC must not unroll it
    for (int64_t t = row0; t < std::min(row0 + kFp8Tile, p.num_tokens); ++t) {
      const T* __restrict gate = static_cast<const T*>(p.gate_up) + t * 2 * I + column0;
      const T* __restrict dy = static_cast<const T*>(p.dy) + t * I + column0;
      const float weight = p.row_weight != nullptr ? p.row_weight[t] : 1.0f;
      T* __restrict dgate = tiles[0][t - row0];
      T* __restrict dup = tiles[1][t - row0];
      alignas(64) float shares[kFp8Tile];
      // The next tile, asked for while this one is read.
      const int64_t ahead = last ? kFp8Tile * 2 * I - column0 : kFp8Tile;
      detail::prefetch_bytes(gate + ahead, kRowBytes);
      detail::prefetch_bytes(gate + I + ahead, kRowBytes);
      detail::prefetch_bytes(dy + (last ? kFp8Tile * I - column0 : kFp8Tile), kRowBytes);
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        const Gradients d = gradients(detail::load(&gate[c]), detail::load(&gate[I + c]),
                                      detail::load(&dy[c]), weight);
        detail::store(&dgate[c], d.gate);
        detail::store(&dup[c], d.up);
        shares[c] = d.share;
      }
      if (p.drow_weight != nullptr) {
        p.scratch[column0 / kFp8Tile * p.num_tokens + t] = detail::sum_row(shares, kFp8Tile);
      }
      if (p.dgate_up != nullptr) {
        T* to = static_cast<T*>(p.dgate_up) + t * 2 * I + column0;
        put_row(dgate, kFp8Tile, streamed, to);
        put_row(dup, kFp8Tile, streamed, to + I);
      }
    }
    for (int64_t half = 0; half < 2; ++half) {
      const detail::Fp8Place at{row0, half * I + column0, 2 * I, streamed};
      emit(tiles[half], p.rows, p.columns, p.rule, at, p.num_tokens);
    }
  }
  detail::stream_fence();
}

DSV3_CLONES void forward_rows(const SwigluForward& p, const float*, int64_t begin, int64_t end,
                              bool streamed) {
  forward_body<float>(p, begin, end, streamed);
}
DSV3_CLONES void forward_rows(const SwigluForward& p, const BFloat16*, int64_t begin, int64_t end,
                              bool streamed) {
  forward_body<BFloat16>(p, begin, end, streamed);
}
DSV3_CLONES void backward_rows(const SwigluBackward& p, const float*, int64_t begin, int64_t end,
                               bool streamed) {
  p.drow_weight != nullptr ? backward_body<float, true>(p, begin, end, streamed)
                           : backward_body<float, false>(p, begin, end, streamed);
}
DSV3_CLONES void backward_rows(const SwigluBackward& p, const BFloat16*, int64_t begin, int64_t end,
                               bool streamed) {
  p.drow_weight != nullptr ? backward_body<BFloat16, true>(p, begin, end, streamed)
                           : backward_body<BFloat16, false>(p, begin, end, streamed);
}
DSV3_CLONES void forward_tiles(const SwigluForward& p, const float*, int64_t begin, int64_t end,
                               bool streamed) {
  forward_tiles_body<float>(p, begin, end, streamed);
}
DSV3_CLONES void forward_tiles(const SwigluForward& p, const BFloat16*, int64_t begin, int64_t end,
                               bool streamed) {
  forward_tiles_body<BFloat16>(p, begin, end, streamed);
}
DSV3_CLONES void backward_tiles(const SwigluBackward& p, const float*, int64_t begin, int64_t end,
                                bool streamed) {
  backward_tiles_body<float>(p, begin, end, streamed);
}
DSV3_CLONES void backward_tiles(const SwigluBackward& p, const BFloat16*, int64_t begin,
                                int64_t end, bool streamed) {
  backward_tiles_body<BFloat16>(p, begin, end, streamed);
}

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
