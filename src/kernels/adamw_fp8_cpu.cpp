// AdamW over a matrix that is also written as E4M3 in 128×128 blocks, on the host: the range is
// updated as adamw_cpu.cpp does, then its new weights are read again and quantised.

#include "kernels/detail/adamw.h"
#include "kernels/detail/cpu.h"
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
  require(p.update.weights != nullptr || p.update.master != nullptr,
          "[adamw_fp8] weights: expected weights or a master, got neither");
}

}  // namespace detail

namespace cpu {
namespace {

using namespace detail;

constexpr int64_t kTile = 128;

/// E4M3, to nearest even, saturating at ±448; NaN is 0x7f.
DSV3_INLINE uint8_t e4m3_code(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  // Normal from 2^-6 on: exponent 127 becomes 7, 3 bits of the mantissa stay.
  const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  // Below: multiples of 2^-9, the last bit of a float at 2^14.
  const uint32_t tiny =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 16384.0f) - 0x46800000u;
  uint32_t code = magnitude < 0x3c800000u ? tiny : normal;
  code = magnitude >= 0x43e80000u ? 0x7eu : code;
  code |= (bits >> 24) & 0x80u;
  return static_cast<uint8_t>(magnitude > 0x7f800000u ? 0x7fu : code);
}

/// The block whose first element is w[0], rows `stride` apart.
template <typename T>
DSV3_INLINE void quantise_block(const AdamWFp8& p, const T* w, int64_t rows, int64_t columns,
                                float* scale_out, uint8_t* codes) {
  float top = p.min_amax;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const float v = std::fabs(load(w + r * p.columns + c));
      top = v > top ? v : top;
    }
  }
  float scale = top / 448.0f, inverse = 448.0f / top;
  if (p.power_of_two) {
    scale = std::bit_cast<float>((std::bit_cast<uint32_t>(scale) + 0x7fffffu) & 0x7f800000u);
    inverse = 1.0f / scale;
  }
  *scale_out = scale;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const float scaled = load(w + r * p.columns + c) * inverse;
      codes[r * p.columns + c] = e4m3_code(scaled);
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
