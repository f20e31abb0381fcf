// AdamW over a matrix that is also written as E4M3 in 128×128 blocks, on the host: the range is
// updated as adamw_cpu.cpp does, then its new weights are read again and quantised.

#include "kernels/detail/adamw.h"
#include "kernels/detail/cpu.h"
#include "kernels/detail/e4m3.h"
#include "kernels/optimizer.h"

namespace dsv3::kernels {
namespace detail {

void check_adamw_fp8(const AdamWFp8& p) {
  check_adamw(p.update);
  require(p.rows >= 0 && p.columns >= 0 && p.update.size == p.rows * p.columns,
          "[adamw_fp8] size: expected rows × columns = {} × {}, got {}", p.rows, p.columns,
          p.update.size);
  require(p.scale_stride >= (p.columns + 127) / 128,
          "[adamw_fp8] scale_stride: expected at least {} (columns / 128, up), got {}",
          (p.columns + 127) / 128, p.scale_stride);
  require(p.update.size == 0 || p.update.weights != nullptr || p.update.master != nullptr,
          "[adamw_fp8] weights: expected weights or a master, got neither");
}

}  // namespace detail

namespace cpu {
namespace {

using namespace detail;

constexpr int64_t kTile = kFp8Tile;

/// The block whose first element is w[0], rows `stride` apart.
template <typename T>
DSV3_INLINE void quantise_block(const AdamWFp8& p, const T* w, int64_t rows, int64_t columns,
                                float* scale_out, uint8_t* codes) {
  float top = 0.0f;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const float v = std::fabs(load(w + r * p.columns + c));
      top = v > top ? v : top;
    }
  }
  const auto [scale, inverse] = kernels::detail::tile_scale(top, p.rule);
  *scale_out = scale;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const float scaled = load(w + r * p.columns + c) * inverse;
      codes[r * p.columns + c] = static_cast<uint8_t>(kernels::detail::e4m3_code(scaled));
    }
  }
}

DSV3_CLONES void quantise(const AdamWFp8& p, const float* w, int64_t rows, int64_t columns,
                          float* scale, uint8_t* codes) {
  quantise_block(p, w, rows, columns, scale, codes);
}
DSV3_CLONES void quantise(const AdamWFp8& p, const BFloat16* w, int64_t rows, int64_t columns,
                          float* scale, uint8_t* codes) {
  quantise_block(p, w, rows, columns, scale, codes);
}

template <typename T>
void quantise_strip(const AdamWFp8& p, const T* weights, int64_t strip) {
  const int64_t row = strip * kTile, rows = std::min(kTile, p.rows - row);
  for (int64_t column = 0; column < p.columns; column += kTile) {
    const int64_t first = row * p.columns + column;
    quantise(p, weights + first, rows, std::min(kTile, p.columns - column),
             p.scales + strip * p.scale_stride + column / kTile, p.codes + first);
  }
}

}  // namespace

void adamw_fp8(const AdamWFp8& p) {
  kernels::detail::check_adamw_fp8(p);
  const AdamW& u = p.update;
  adamw(u);
  if (u.skip != nullptr && *u.skip != 0) return;
  parallel_rows((p.rows + kTile - 1) / kTile, 4 * kTile * p.columns,
                [&](int64_t begin, int64_t end) {
                  for (int64_t strip = begin; strip < end; ++strip) {
                    if (u.master != nullptr || u.weight_dtype == DType::kF32) {
                      const void* w = u.master != nullptr ? u.master : u.weights;
                      quantise_strip(p, static_cast<const float*>(w), strip);
                    } else {
                      quantise_strip(p, static_cast<const BFloat16*>(u.weights), strip);
                    }
                  }
                });
}

}  // namespace cpu
}  // namespace dsv3::kernels
