// FP8 tiles on the host: finite ones register by register (kernels/detail/fp8_lanes.h), those with
// an infinity or a NaN element by element; results leave as whole cache lines.
#include "kernels/detail/fp8_cpu.h"

#include "kernels/detail/e4m3.h"
#include "kernels/detail/fp8_lanes.h"
#include "kernels/detail/streaming.h"

namespace dsv3::kernels::cpu::detail {
namespace {

/// |x| of the largest, NaN passed over.
template <typename T>
DSV3_INLINE float amax_of(const T* x, int64_t size, int64_t stride) {
  float top = 0.0f;
  for (int64_t i = 0; i < size; ++i) {
    const float magnitude = std::abs(load(x + i * stride));
    top = magnitude > top ? magnitude : top;
  }
  return top;
}

template <typename T>
DSV3_INLINE uint8_t code_of(const T* x, float inverse) {
  return static_cast<uint8_t>(kernels::detail::e4m3_scaled_code(load(x) * inverse));
}

/// Where rows of a tile go: codes `columns` of each, `code_stride` apart.
struct RowTarget {
  uint8_t* codes;
  int64_t code_stride, columns;
  bool streamed;
  float* scales;
  int64_t scale_stride;
  NextRows next = {};
};

/// The codes of a row of 128 numbers.
template <typename V, typename T>
DSV3_INLINE void encode_row(const T* x, float inverse, bool finite, uint8_t* codes) {
  if (!finite) {
    for (int64_t i = 0; i < kFp8Tile; ++i) codes[i] = code_of(x + i, inverse);
    return;
  }
  Pair<V> factor;
  factor.a = typename V::Floats{} + inverse;
  factor.b = factor.a;
  for (int64_t i = 0; i < kFp8Tile; i += V::kPair) encode_pair<V>(x + i, factor, codes + i);
}

/// Rows of 128 numbers, one after the other, each a tile.
template <typename V, typename T>
DSV3_INLINE void encode_rows(const T* x, int64_t rows, const ScaleRule& rule,
                             const RowTarget& out) {
  for (int64_t first = 0; first < rows; first += kAtOnce) {
    const int64_t count = std::min(kAtOnce, rows - first);
    Ints4 tops[kAtOnce] = {};
    for (int64_t r = 0; r < count; ++r) {
      Tops<V, T> row;
      for (int64_t i = 0; i < kFp8Tile; i += V::kPair) row.raise(x + (first + r) * kFp8Tile + i);
      Pair<V> pair;
      row.get(pair);
      fold<V>(pair, tops[r]);
    }
    Ints4 bits;
    fold(tops, bits);
    float amax[kAtOnce], scale[kAtOnce], inverse[kAtOnce];
    std::memcpy(amax, &bits, sizeof(bits));
    bool finite = true;
    for (int64_t r = 0; r < count; ++r) finite = finite && amax[r] < __builtin_inff();
    for (int64_t r = 0; r < count && !finite; ++r) {
      amax[r] = amax_of(x + (first + r) * kFp8Tile, kFp8Tile, 1);
    }
    for (int64_t r = 0; r < kAtOnce; ++r) {
      const auto pair = kernels::detail::tile_scale(amax[r], rule);
      scale[r] = pair.scale;
      inverse[r] = pair.inverse;
    }
    for (int64_t r = 0; r < count; ++r) {
      const T* row = x + (first + r) * kFp8Tile;
      uint8_t* const to = out.codes + (first + r) * out.code_stride;
      out.scales[(first + r) * out.scale_stride] = scale[r];
      out.next.ask(first + r);
      if (!out.streamed && out.columns == kFp8Tile) {
        encode_row<V>(row, inverse[r], finite, to);
        continue;
      }
      alignas(64) uint8_t codes[kFp8Tile];
      encode_row<V>(row, inverse[r], finite, codes);
      put_bytes<V>(to, codes, out.columns, out.streamed);
    }
  }
}

/// `size` numbers, then zeros.
template <typename T>
DSV3_INLINE void copy_padded(const T* x, int64_t size, T* out) {
  std::copy_n(x, size, out);
  std::fill_n(out + size, kFp8Tile - size, T{});
}

template <typename V, typename T>
DSV3_INLINE void row_tiles_body(const T* x, int64_t size, const ScaleRule& rule, uint8_t* codes,
                                float* scales, int64_t scale_stride) {
  const int64_t whole = size / kFp8Tile, rest = size % kFp8Tile;
  encode_rows<V>(x, whole, rule, {codes, kFp8Tile, kFp8Tile, false, scales, scale_stride});
  if (rest == 0) return;
  Room<T, kFp8Tile> last;
  copy_padded(x + whole * kFp8Tile, rest, last.data());
  encode_rows<V>(last.data(), 1, rule,
                 {codes + whole * kFp8Tile, kFp8Tile, rest, false, scales + whole * scale_stride,
                  scale_stride});
}

template <typename V, typename T>
DSV3_INLINE float block_body(const T* x, int64_t stride, int64_t rows, int64_t columns,
                             const ScaleRule& rule, uint8_t* codes, int64_t width) {
  Tops<V, T> tops;
  Room<T, kFp8Tile> room;
  const auto row = [&](int64_t r) __attribute__((always_inline)) {
    const T* const from = x + r * stride;
    if (columns == kFp8Tile) return from;
    copy_padded(from, columns, room.data());
    return static_cast<const T*>(room.data());
  };
  for (int64_t r = 0; r < rows; ++r) {
    const T* const from = row(r);
    for (int64_t i = 0; i < kFp8Tile; i += V::kPair) tops.raise(from + i);
  }
  Pair<V> pair;
  tops.get(pair);
  Ints4 top;
  fold<V>(pair, top);
  uint32_t bits = 0;
  for (int64_t i = 0; i < kAtOnce; ++i) bits = std::max(bits, uint32_t{top[i]});
  auto amax = std::bit_cast<float>(bits);
  const bool finite = amax < __builtin_inff();
  if (!finite) {
    amax = 0.0f;
    for (int64_t r = 0; r < rows; ++r) amax = std::max(amax, amax_of(x + r * stride, columns, 1));
  }
  const auto scale = kernels::detail::tile_scale(amax, rule);
  alignas(64) uint8_t made[kFp8Tile];
  for (int64_t r = 0; r < rows; ++r) {
    const bool whole = columns == kFp8Tile;
    encode_row<V>(row(r), scale.inverse, finite, whole ? codes + r * width : made);
    if (!whole) std::memcpy(codes + r * width, made, static_cast<size_t>(columns));
  }
  return scale.scale;
}

/// Whether pieces of rows of `to`, of multiples of `piece` bytes, are whole cache lines.
bool whole_lines(const void* to, int64_t row_bytes, int64_t piece) {
  return (reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(row_bytes | piece)) % 64 == 0;
}

template <typename V, typename T>
DSV3_INLINE void rows_body(const Fp8TileRow<T>* tile, const Fp8Rows& out, const ScaleRule& rule,
                           const Fp8Place& at, int64_t rows) {
  const int64_t columns = std::min(kFp8Tile, at.width - at.column0);
  encode_rows<V>(tile[0], rows, rule,
                 {out.data + at.row0 * at.width + at.column0, at.width, columns,
                  at.streamed && whole_lines(out.data, at.width, columns),
                  out.scales + at.column0 / kFp8Tile * out.scale_stride + at.row0, 1, at.next});
}

/// Columns that are encoded before they are transposed.
constexpr int64_t kStrip = kBlocks * kSide;

/// The scales of a strip's columns and its codes, row by row. False where not all is finite.
template <typename V, typename T>
DSV3_INLINE bool encode_strip(const Fp8TileRow<T>* tile, int64_t column, const ScaleRule& rule,
                              const NextRows& next, float* scales, uint8_t (*codes)[kStrip]) {
  static_assert(kStrip % V::kPair == 0);
  for (int64_t c = 0; c < kStrip; c += V::kPair) {
    Tops<V, T> tops;
    for (int64_t r = 0; r < kFp8Tile; ++r) tops.raise(tile[r] + column + c);
    Pair<V> amax, inverse;
    tops.get(amax);
    alignas(64) float top[V::kPair], scale[V::kPair], inverses[V::kPair];
    store_pair<V>(top, WholePair<V>{}, amax);
    bool finite = true;
    for (int64_t i = 0; i < V::kPair; ++i) finite = finite && top[i] < __builtin_inff();
    if (!finite) return false;
#pragma omp simd
    for (int64_t i = 0; i < V::kPair; ++i) {
      const auto pair = kernels::detail::tile_scale(top[i], rule);
      scale[i] = pair.scale;
      inverses[i] = pair.inverse;
    }
    load_pair<V>(inverses, WholePair<V>{}, inverse);
    for (int64_t i = 0; i < V::kPair; ++i) scales[c + place_in_pair<V, T>(i)] = scale[i];
    for (int64_t r = 0; r < kFp8Tile; ++r) {
      constexpr int64_t kPairs = kFp8Tile / V::kPair;  // across a tile
      if (r % kPairs == 0) next.ask(((column + c) / V::kPair * kFp8Tile + r) / kPairs);
      encode_pair<V>(tile[r] + column + c, inverse, codes[r] + c);
    }
  }
  return true;
}

template <typename V, typename T>
DSV3_INLINE void columns_body(const Fp8TileRow<T>* tile, const Fp8Columns& out,
                              const ScaleRule& rule, const Fp8Place& at, int64_t padded) {
  const int64_t columns = std::min(kFp8Tile, at.width - at.column0);
  const bool streamed = at.streamed && whole_lines(out.data, padded, kFp8Tile);
  float* const to_scales = out.scales + at.row0 / kFp8Tile * out.scale_stride + at.column0;
  for (int64_t first = 0; first < columns; first += kStrip) {
    const int64_t count = std::min(kStrip, columns - first);
    alignas(64) uint8_t codes[kFp8Tile][kStrip], turned[kStrip][kFp8Tile];
    alignas(64) float scales[kStrip];
    if (!encode_strip<V>(tile, first, rule, at.next, scales, codes)) {
      for (int64_t c = 0; c < kStrip; ++c) {
        const T* const column = tile[0] + first + c;
        const auto scale = kernels::detail::tile_scale(amax_of(column, kFp8Tile, kFp8Tile), rule);
        scales[c] = scale.scale;
        for (int64_t r = 0; r < kFp8Tile; ++r) {
          codes[r][c] = code_of(column + r * kFp8Tile, scale.inverse);
        }
      }
    }
    std::memcpy(to_scales + first, scales, static_cast<size_t>(count) * sizeof(float));
    for (int64_t r = 0; r < kFp8Tile; r += kSide) {
      transpose_bytes(codes + r, turned[0] + r, kFp8Tile);
    }
    for (int64_t c = 0; c < count; ++c) {
      uint8_t* const column = out.data + (at.column0 + first + c) * padded + at.row0;
      put_bytes<V>(column, turned[c], kFp8Tile, streamed);
    }
  }
}

}  // namespace

// The four functions of the header for T. Note: each is chosen by width within this source only.
#define DSV3_FP8_FUNCTIONS(T)                                                                  \
  namespace {                                                                                  \
  DSV3_WIDE(void encode_row_tiles_of,                                                          \
            (const T* x, int64_t size, const ScaleRule& rule, uint8_t* codes, float* scales,   \
             int64_t scale_stride),                                                            \
            row_tiles_body<V>(x, size, rule, codes, scales, scale_stride))                     \
  DSV3_WIDE(float encode_block_of,                                                             \
            (const T* x, int64_t stride, int64_t rows, int64_t columns, const ScaleRule& rule, \
             uint8_t* codes, int64_t width),                                                   \
            return block_body<V>(x, stride, rows, columns, rule, codes, width))                \
  DSV3_WIDE(void emit_rows_of,                                                                 \
            (const Fp8TileRow<T>* tile, const Fp8Rows& out, const ScaleRule& rule,             \
             const Fp8Place& at, int64_t rows),                                                \
            rows_body<V>(tile, out, rule, at, rows))                                           \
  DSV3_WIDE(void emit_columns_of,                                                              \
            (const Fp8TileRow<T>* tile, const Fp8Columns& out, const ScaleRule& rule,          \
             const Fp8Place& at, int64_t padded),                                              \
            columns_body<V>(tile, out, rule, at, padded))                                      \
  }                                                                                            \
  void encode_row_tiles(const T* x, int64_t size, const ScaleRule& rule, uint8_t* codes,       \
                        float* scales, int64_t scale_stride) {                                 \
    encode_row_tiles_of(x, size, rule, codes, scales, scale_stride);                           \
  }                                                                                            \
  float encode_block(const T* x, int64_t stride, int64_t rows, int64_t columns,                \
                     const ScaleRule& rule, uint8_t* codes, int64_t width) {                   \
    return encode_block_of(x, stride, rows, columns, rule, codes, width);                      \
  }                                                                                            \
  void emit_rows(const Fp8TileRow<T>* tile, const Fp8Rows& out, const ScaleRule& rule,         \
                 const Fp8Place& at, int64_t rows) {                                           \
    emit_rows_of(tile, out, rule, at, rows);                                                   \
  }                                                                                            \
  void emit_columns(const Fp8TileRow<T>* tile, const Fp8Columns& out, const ScaleRule& rule,   \
                    const Fp8Place& at, int64_t padded) {                                      \
    emit_columns_of(tile, out, rule, at, padded);                                              \
  }
DSV3_FP8_FUNCTIONS(float)
DSV3_FP8_FUNCTIONS(BFloat16)
#undef DSV3_FP8_FUNCTIONS

}  // namespace dsv3::kernels::cpu::detail
