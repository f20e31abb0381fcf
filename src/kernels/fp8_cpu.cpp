// FP8 tiles on the host: maxima as integers, codes by arithmetic on the floats' bits, results
// collected to whole cache lines.
#include "kernels/detail/fp8_cpu.h"

#include "kernels/detail/e4m3.h"
#include "kernels/detail/lanes.h"
#include "kernels/detail/streaming.h"

namespace dsv3::kernels::cpu::detail {
namespace {

/// Keys order as |x| does, NaN before everything: a maximum of integers passes over NaN.
struct FloatKey {
  using Type = int32_t;
  static constexpr Type kZero = 0x7fffff;
  DSV3_INLINE static Type of(float x) {
    return static_cast<Type>((std::bit_cast<uint32_t>(x) & 0x7fffffffu) + 0x7fffffu);
  }
  DSV3_INLINE static float magnitude(Type key) { return std::bit_cast<float>(key - kZero); }
};
struct Bf16Key {
  using Type = int16_t;
  static constexpr Type kZero = 0x7f;
  DSV3_INLINE static Type of(BFloat16 x) {
    return static_cast<Type>(static_cast<uint16_t>((x.bits & 0x7fffu) + 0x7fu));
  }
  DSV3_INLINE static float magnitude(Type key) {
    return std::bit_cast<float>(static_cast<uint32_t>(key - kZero) << 16);
  }
};
template <typename T>
using Key = std::conditional_t<std::is_same_v<T, float>, FloatKey, Bf16Key>;

/// The key of max |x|.
template <typename T>
DSV3_INLINE auto top_key(const T* x, int64_t size) {
  typename Key<T>::Type top = Key<T>::kZero;
  if (size == kFp8Tile) {
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < kFp8Tile; ++i) top = std::max(top, Key<T>::of(x[i]));
    return top;
  }
  for (int64_t i = 0; i < size; ++i) top = std::max(top, Key<T>::of(x[i]));
  return top;
}

template <typename T>
DSV3_INLINE uint8_t code_of(const T* x, float inverse) {
  return static_cast<uint8_t>(kernels::detail::e4m3_scaled_code(load(x) * inverse));
}

template <typename T>
DSV3_INLINE void encode_row(const T* __restrict x, int64_t size, float inverse,
                            uint8_t* __restrict codes) {
  if (size == kFp8Tile) {
#pragma omp simd
    for (int64_t i = 0; i < kFp8Tile; ++i) codes[i] = code_of(x + i, inverse);
    return;
  }
  for (int64_t i = 0; i < size; ++i) codes[i] = code_of(x + i, inverse);
}

/// Tiles whose scales are divided side by side, which hides how long a division takes.
constexpr int64_t kAtOnce = kLanes;

/// Note: lanes are set in a register, because a vector loaded right after its parts were stored
/// waits for all stores before them.
DSV3_INLINE void set_lane(LaneFloats& lanes, int64_t i, float value) {
  constexpr LaneInts kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const LaneInts here = LaneInts{} + static_cast<uint32_t>(i);
  lanes = kLane == here ? LaneFloats{} + value : lanes;
}

DSV3_INLINE void scales_of(const LaneFloats& amax, const ScaleRule& rule, float* scales,
                           float* inverse) {
#pragma omp simd
  for (int64_t i = 0; i < kAtOnce; ++i) {
    const auto pair = kernels::detail::tile_scale(amax[i], rule);
    scales[i] = pair.scale;
    inverse[i] = pair.inverse;
  }
}

template <typename T>
DSV3_INLINE void row_tiles_body(const T* x, int64_t size, const ScaleRule& rule, uint8_t* codes,
                                float* scales, int64_t scale_stride) {
  LaneFloats amax = {};
  alignas(64) float scale[kAtOnce], inverse[kAtOnce];
  for (int64_t first = 0; first < size; first += kAtOnce * kFp8Tile) {
    const int64_t part = std::min(kAtOnce * kFp8Tile, size - first);
    for (int64_t i = 0; i * kFp8Tile < part; ++i) {
      const int64_t at = i * kFp8Tile;
      const auto top = top_key(x + first + at, std::min(kFp8Tile, part - at));
      set_lane(amax, i, Key<T>::magnitude(top));
    }
    scales_of(amax, rule, scale, inverse);
    for (int64_t i = 0; i * kFp8Tile < part; ++i, scales += scale_stride) {
      const int64_t at = first + i * kFp8Tile;
      encode_row(x + at, std::min(kFp8Tile, size - at), inverse[i], codes + at);
      *scales = scale[i];
    }
  }
}

template <typename T>
DSV3_INLINE float block_body(const T* x, int64_t stride, int64_t rows, int64_t columns,
                             const ScaleRule& rule, uint8_t* codes, int64_t width) {
  typename Key<T>::Type top = Key<T>::kZero;
  for (int64_t r = 0; r < rows; ++r) top = std::max(top, top_key(x + r * stride, columns));
  const auto scale = kernels::detail::tile_scale(Key<T>::magnitude(top), rule);
  for (int64_t r = 0; r < rows; ++r) {
    encode_row(x + r * stride, columns, scale.inverse, codes + r * width);
  }
  return scale.scale;
}

/// Whether pieces of rows of `to`, of multiples of `piece` bytes, are whole cache lines.
bool whole_lines(const void* to, int64_t row_bytes, int64_t piece) {
  return (reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(row_bytes | piece)) % 64 == 0;
}

template <typename T>
DSV3_INLINE void rows_body(const Fp8TileRow<T>* tile, const Fp8Rows& out, const ScaleRule& rule,
                           const Fp8Place& at, int64_t rows) {
  const int64_t columns = std::min(kFp8Tile, at.width - at.column0);
  const bool streamed = at.streamed && whole_lines(out.data, at.width, columns);
  float* scales = out.scales + at.column0 / kFp8Tile * out.scale_stride + at.row0;
  uint8_t* to = out.data + at.row0 * at.width + at.column0;
  LaneFloats amax = {};
  alignas(64) float scale[kAtOnce], inverse[kAtOnce];
  for (int64_t first = 0; first < rows; first += kAtOnce) {
    const int64_t part = std::min(kAtOnce, rows - first);
    for (int64_t i = 0; i < part; ++i) {
      set_lane(amax, i, Key<T>::magnitude(top_key(tile[first + i], columns)));
    }
    scales_of(amax, rule, scale, inverse);
    std::memcpy(scales + first, scale, static_cast<size_t>(part) * sizeof(float));
    for (int64_t i = 0; i < part; ++i, to += at.width) {
      if (!streamed) {
        encode_row(tile[first + i], columns, inverse[i], to);
        continue;
      }
      alignas(64) uint8_t codes[kFp8Tile];
      encode_row(tile[first + i], columns, inverse[i], codes);
      stream_bytes(to, codes, columns);
    }
  }
}

constexpr int64_t kBytes = 16;
using Bytes [[gnu::vector_size(16)]] = uint8_t;

/// A 16×16 block of bytes transposed: four times, every row is interleaved with the one 8 further
/// on.
DSV3_INLINE void transpose_bytes(const uint8_t (*from)[kFp8Tile], uint8_t (*to)[kFp8Tile]) {
  Bytes rows[kBytes], next[kBytes];
  for (int64_t i = 0; i < kBytes; ++i) std::memcpy(&rows[i], from[i], kBytes);
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kBytes / 2; ++i) {
      const Bytes a = rows[i], b = rows[i + kBytes / 2];
      next[2 * i] =
          __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                                14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kBytes; ++i) rows[i] = next[i];
  }
  for (int64_t i = 0; i < kBytes; ++i) std::memcpy(to[i], &rows[i], kBytes);
}

template <typename T>
DSV3_INLINE void columns_body(const Fp8TileRow<T>* tile, const Fp8Columns& out,
                              const ScaleRule& rule, const Fp8Place& at, int64_t padded) {
  alignas(64) typename Key<T>::Type top[kFp8Tile];
  alignas(64) float scales[kFp8Tile], inverse[kFp8Tile];
  alignas(64) uint8_t codes[kFp8Tile][kFp8Tile], turned[kBytes][kFp8Tile];
  for (int64_t c = 0; c < kFp8Tile; ++c) top[c] = Key<T>::kZero;
  for (int64_t r = 0; r < kFp8Tile; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < kFp8Tile; ++c) top[c] = std::max(top[c], Key<T>::of(tile[r][c]));
  }
#pragma omp simd
  for (int64_t c = 0; c < kFp8Tile; ++c) {
    const auto scale = kernels::detail::tile_scale(Key<T>::magnitude(top[c]), rule);
    scales[c] = scale.scale;
    inverse[c] = scale.inverse;
  }
  const int64_t columns = std::min(kFp8Tile, at.width - at.column0);
  std::memcpy(out.scales + at.row0 / kFp8Tile * out.scale_stride + at.column0, scales,
              static_cast<size_t>(columns) * sizeof(float));
  for (int64_t r = 0; r < kFp8Tile; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < kFp8Tile; ++c) codes[r][c] = code_of(&tile[r][c], inverse[c]);
  }
  const bool streamed = at.streamed && whole_lines(out.data, padded, kFp8Tile);
  uint8_t* const to = out.data + at.column0 * padded + at.row0;
  for (int64_t c = 0; c < columns; c += kBytes) {
    for (int64_t r = 0; r < kFp8Tile; r += kBytes) {
      transpose_bytes(reinterpret_cast<const uint8_t(*)[kFp8Tile]>(&codes[r][c]),
                      reinterpret_cast<uint8_t(*)[kFp8Tile]>(&turned[0][r]));
    }
    for (int64_t i = 0; i < std::min(kBytes, columns - c); ++i) {
      uint8_t* const column = to + (c + i) * padded;
      streamed ? stream_bytes(column, turned[i], kFp8Tile)
               : static_cast<void>(std::memcpy(column, turned[i], kFp8Tile));
    }
  }
}

}  // namespace

DSV3_CLONES void encode_row_tiles(const float* x, int64_t size, const ScaleRule& rule,
                                  uint8_t* codes, float* scales, int64_t scale_stride) {
  row_tiles_body(x, size, rule, codes, scales, scale_stride);
}
DSV3_CLONES void encode_row_tiles(const BFloat16* x, int64_t size, const ScaleRule& rule,
                                  uint8_t* codes, float* scales, int64_t scale_stride) {
  row_tiles_body(x, size, rule, codes, scales, scale_stride);
}

DSV3_CLONES float encode_block(const float* x, int64_t stride, int64_t rows, int64_t columns,
                               const ScaleRule& rule, uint8_t* codes, int64_t width) {
  return block_body(x, stride, rows, columns, rule, codes, width);
}
DSV3_CLONES float encode_block(const BFloat16* x, int64_t stride, int64_t rows, int64_t columns,
                               const ScaleRule& rule, uint8_t* codes, int64_t width) {
  return block_body(x, stride, rows, columns, rule, codes, width);
}

DSV3_CLONES void emit_rows(const Fp8TileRow<float>* tile, const Fp8Rows& out, const ScaleRule& rule,
                           const Fp8Place& at, int64_t rows) {
  rows_body(tile, out, rule, at, rows);
}
DSV3_CLONES void emit_rows(const Fp8TileRow<BFloat16>* tile, const Fp8Rows& out,
                           const ScaleRule& rule, const Fp8Place& at, int64_t rows) {
  rows_body(tile, out, rule, at, rows);
}

DSV3_CLONES void emit_columns(const Fp8TileRow<float>* tile, const Fp8Columns& out,
                              const ScaleRule& rule, const Fp8Place& at, int64_t padded) {
  columns_body(tile, out, rule, at, padded);
}
DSV3_CLONES void emit_columns(const Fp8TileRow<BFloat16>* tile, const Fp8Columns& out,
                              const ScaleRule& rule, const Fp8Place& at, int64_t padded) {
  columns_body(tile, out, rule, at, padded);
}

}  // namespace dsv3::kernels::cpu::detail
