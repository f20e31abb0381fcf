#include "bench/ops/fp8.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>

#include "ops/fp8.h"

namespace dsv3::bench {
namespace {

constexpr int64_t kTile = 128;
constexpr double kLargest = 448.0, kSmallestAmax = 1e-12;

/// Codes and scales of `tiles`, whose dims `over` make up one tile.
ComposedTiles quantized(const at::Tensor& tiles, at::IntArrayRef over) {
  const at::Tensor amax =
      tiles.abs().amax(over, /*keepdim=*/true).to(at::kFloat).clamp_min(kSmallestAmax);
  return {(tiles * (kLargest / amax)).to(at::kFloat8_e4m3fn), amax / kLargest};
}

}  // namespace

ComposedTiles composed_rows(const at::Tensor& x) {
  const int64_t missing = padded_rows(x.size(1)) - x.size(1);
  const at::Tensor whole = missing == 0 ? x : at::constant_pad_nd(x, {0, missing});
  return quantized(whole.unflatten(1, {-1, kTile}), {2});
}

ComposedTiles composed_columns(const at::Tensor& x) {
  return composed_rows(x.t().contiguous());
}

ComposedTiles composed_blocks(const at::Tensor& x) {
  return quantized(x.view({x.size(0) / kTile, kTile, x.size(1) / kTile, kTile}), {1, 3});
}

at::Tensor composed_dequantize(const ComposedTiles& tiles, at::ScalarType dtype) {
  return (tiles.codes.to(at::kFloat) * tiles.scales).to(dtype).flatten(1);
}

int64_t scale_bytes(int64_t rows, int64_t width) {
  return 4 * rows * ((width + kTile - 1) / kTile);
}

int64_t padded_rows(int64_t rows) {
  return (rows + kTile - 1) / kTile * kTile;
}

kernels::Fp8Rows fp8_rows(Setup& setup, int64_t num_tokens, int64_t width) {
  const auto tiles = ops::empty_row_tiles(num_tokens, width, setup.empty({0}));
  setup.keep(tiles.data), setup.keep(tiles.scales);
  return ops::rows_of(tiles);
}

kernels::Fp8Columns fp8_columns(Setup& setup, int64_t num_tokens, int64_t width) {
  const auto tiles = ops::empty_column_tiles(num_tokens, width, setup.empty({0}));
  setup.keep(tiles.data), setup.keep(tiles.scales);
  return ops::columns_of(tiles);
}

kernels::ScaleRule default_rule() {
  return ops::scale_rule({}, "bench");
}

}  // namespace dsv3::bench
