// AdamW over a matrix that is also written as E4M3 in 128×128 blocks, on the host: the range is
// updated as adamw_cpu.cpp does, then its new weights are read again and quantised.

#include "kernels/detail/adamw.h"
#include "kernels/detail/cpu.h"
#include "kernels/detail/fp8_cpu.h"
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

template <typename T>
void quantise_strip(const AdamWFp8& p, const T* weights, int64_t strip) {
  const int64_t row = strip * kTile, rows = std::min(kTile, p.rows - row);
  for (int64_t column = 0; column < p.columns; column += kTile) {
    const int64_t first = row * p.columns + column, columns = std::min(kTile, p.columns - column);
    p.scales[strip * p.scale_stride + column / kTile] =
        encode_block(weights + first, p.columns, rows, columns, p.rule, p.codes + first, p.columns);
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
