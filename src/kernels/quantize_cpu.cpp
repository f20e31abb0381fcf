// FP8 tiles on the host: threads over 128×128 tiles, each read once into the second cache level
// and written in the forms that are wanted.
#include "kernels/quantize.h"

#include "kernels/detail/e4m3.h"
#include "kernels/detail/fp8_cpu.h"
#include "kernels/detail/streaming.h"

namespace dsv3::kernels {

int64_t latent_cache_bytes(int64_t latent_dim, int64_t rope_dim, DType cache_dtype) {
  if (cache_dtype == DType::kBF16) return 2 * (latent_dim + rope_dim);
  return latent_dim + latent_dim / kFp8Tile * 4 + 2 * rope_dim;
}

namespace cpu {
namespace {

using detail::Fp8TileRow;

/// Where the rows of an output tile come from.
struct TileRows {
  int64_t source, valid;
};

TileRows locate(const QuantizeTiles& p, int64_t tile) {
  const int64_t row = tile * kFp8Tile;
  if (p.groups.num_groups == 0) return {row, std::min(kFp8Tile, p.num_tokens - row)};
  int64_t start = 0, begin = 0;
  for (int32_t e = 0; e < p.groups.num_groups; ++e) {
    const int64_t end = p.groups.ends[e];
    const int64_t padded = (end - begin + kFp8Tile - 1) / kFp8Tile * kFp8Tile;
    if (row < start + padded) {
      return {begin + row - start, std::min(kFp8Tile, end - begin - (row - start))};
    }
    start += padded;
    begin = end;
  }
  return {0, 0};
}

/// A tile of FP8 numbers waits as the FP32 that they are.
template <typename T>
using Kept = std::conditional_t<std::is_same_v<T, uint8_t>, float, T>;

template <typename T>
DSV3_INLINE void load_row(const QuantizeTiles&, const T* __restrict x, int64_t, int64_t,
                          int64_t columns, T* __restrict out) {
  std::memcpy(out, x, static_cast<size_t>(columns) * sizeof(T));
}
DSV3_INLINE void load_row(const QuantizeTiles& p, const uint8_t* __restrict x, int64_t row,
                          int64_t column, int64_t columns, float* __restrict out) {
  const float scale = p.x_scales[column / kFp8Tile * p.x_scale_stride + row];
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) out[c] = kernels::detail::e4m3_value(x[c]) * scale;
}

/// Tiles [begin, end) in the order of rows, then columns.
template <typename T>
DSV3_INLINE void tiles_body(const QuantizeTiles& p, int64_t begin, int64_t end, bool streamed) {
  alignas(64) Fp8TileRow<Kept<T>> tile[kFp8Tile];
  const int64_t across = (p.width + kFp8Tile - 1) / kFp8Tile;
  const bool grouped = p.groups.num_groups > 0;
  const int64_t padded =
      grouped ? p.groups.padded_rows : (p.num_tokens + kFp8Tile - 1) / kFp8Tile * kFp8Tile;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t down = i / across, column = i % across * kFp8Tile;
    const auto [source, valid] = locate(p, down);
    const int64_t columns = std::min(kFp8Tile, p.width - column);
    // Rows that do not exist matter only where they leave as zeros.
    const int64_t needed = grouped || p.columns.data != nullptr ? kFp8Tile : valid;
    for (int64_t r = 0; r < needed; ++r) {
      const int64_t filled = r < valid ? columns : 0;
      if (filled > 0) {
        const T* x = static_cast<const T*>(p.x) + (source + r) * p.x_stride + column;
        load_row(p, x, source + r, column, filled, tile[r]);
      }
      for (int64_t c = filled; c < kFp8Tile; ++c) tile[r][c] = {};
    }
    detail::Fp8Place at{down * kFp8Tile, column, p.width, streamed};
    if (valid > 0) {
      at.next = detail::NextRows::of(static_cast<const T*>(p.x) + source * p.x_stride, p.x_stride,
                                     column / kFp8Tile, across);
    }
    if (p.rows.data != nullptr) {
      detail::emit_rows(tile, p.rows, p.rule, at, grouped ? kFp8Tile : valid);
      at.next = {};
    }
    if (p.columns.data != nullptr) detail::emit_columns(tile, p.columns, p.rule, at, padded);
  }
  detail::stream_fence();
}

DSV3_CLONES void quantize_part(const QuantizeTiles& p, const float*, int64_t begin, int64_t end,
                               bool streamed) {
  tiles_body<float>(p, begin, end, streamed);
}
DSV3_CLONES void quantize_part(const QuantizeTiles& p, const BFloat16*, int64_t begin, int64_t end,
                               bool streamed) {
  tiles_body<BFloat16>(p, begin, end, streamed);
}
DSV3_CLONES void quantize_part(const QuantizeTiles& p, const uint8_t*, int64_t begin, int64_t end,
                               bool streamed) {
  tiles_body<uint8_t>(p, begin, end, streamed);
}

template <typename T>
DSV3_INLINE void blocks_body(const QuantizeBlocks& p, int64_t begin, int64_t end) {
  const int64_t across = (p.width + kFp8Tile - 1) / kFp8Tile;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / across * kFp8Tile, column = i % across * kFp8Tile;
    const int64_t rows = std::min(kFp8Tile, p.num_rows - row);
    const int64_t columns = std::min(kFp8Tile, p.width - column);
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride + column;
    p.scales[row / kFp8Tile * p.scale_stride + column / kFp8Tile] = detail::encode_block(
        x, p.x_stride, rows, columns, p.rule, p.data + row * p.width + column, p.width);
  }
}

DSV3_CLONES void blocks_part(const QuantizeBlocks& p, const float*, int64_t begin, int64_t end) {
  blocks_body<float>(p, begin, end);
}
DSV3_CLONES void blocks_part(const QuantizeBlocks& p, const BFloat16*, int64_t begin, int64_t end) {
  blocks_body<BFloat16>(p, begin, end);
}

template <typename T>
DSV3_INLINE void dequantize_row(const uint8_t* __restrict codes, int64_t columns, float scale,
                                T* __restrict y) {
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) {
    detail::store(&y[c], kernels::detail::e4m3_value(codes[c]) * scale);
  }
}

template <typename T>
DSV3_INLINE void dequantize_body(const Dequantize& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    T* y = static_cast<T*>(p.y) + t * p.width;
    if (p.tiling == Fp8Tiling::kColumns) {
      const float* scales = p.scales + t / kFp8Tile * p.scale_stride;
      for (int64_t k = 0; k < p.width; ++k) {
        detail::store(&y[k],
                      kernels::detail::e4m3_value(p.data[k * p.data_stride + t]) * scales[k]);
      }
      continue;
    }
    const uint8_t* codes = p.data + t * p.width;
    for (int64_t column = 0; column < p.width; column += kFp8Tile) {
      const int64_t j = column / kFp8Tile;
      const float scale = p.tiling == Fp8Tiling::kRows
                              ? p.scales[j * p.scale_stride + t]
                              : p.scales[t / kFp8Tile * p.scale_stride + j];
      dequantize_row(codes + column, std::min(kFp8Tile, p.width - column), scale, y + column);
    }
  }
}

DSV3_CLONES void dequantize_part(const Dequantize& p, const float*, int64_t begin, int64_t end) {
  dequantize_body<float>(p, begin, end);
}
DSV3_CLONES void dequantize_part(const Dequantize& p, const BFloat16*, int64_t begin, int64_t end) {
  dequantize_body<BFloat16>(p, begin, end);
}

}  // namespace

void quantize_tiles(const QuantizeTiles& p) {
  const int64_t rows = p.groups.num_groups > 0 ? p.groups.padded_rows : p.num_tokens;
  const int64_t tiles = (rows + kFp8Tile - 1) / kFp8Tile * ((p.width + kFp8Tile - 1) / kFp8Tile);
  const int64_t bytes = kFp8Tile * kFp8Tile * (size_of(p.dtype) + 1);
  const bool streamed = tiles * bytes >= detail::kStreamedBytes;
  const auto run = [&](auto* type) {
    detail::parallel_rows(tiles, bytes, [&](int64_t begin, int64_t end) {
      quantize_part(p, type, begin, end, streamed);
    });
  };
  if (p.dtype == DType::kF8E4M3) return run(static_cast<uint8_t*>(nullptr));
  detail::dispatch_float("quantize_tiles", p.dtype, run);
}

void quantize_blocks(const QuantizeBlocks& p) {
  const int64_t tiles =
      (p.num_rows + kFp8Tile - 1) / kFp8Tile * ((p.width + kFp8Tile - 1) / kFp8Tile);
  const int64_t bytes = kFp8Tile * kFp8Tile * (size_of(p.dtype) + 1);
  detail::dispatch_float("quantize_blocks", p.dtype, [&](auto* type) {
    detail::parallel_rows(tiles, bytes,
                          [&](int64_t begin, int64_t end) { blocks_part(p, type, begin, end); });
  });
}

void dequantize(const Dequantize& p) {
  detail::dispatch_float("dequantize", p.dtype, [&](auto* type) {
    detail::parallel_rows(
        p.num_tokens, p.width * (size_of(p.dtype) + 1),
        [&](int64_t begin, int64_t end) { dequantize_part(p, type, begin, end); });
  });
}

}  // namespace cpu
}  // namespace dsv3::kernels
