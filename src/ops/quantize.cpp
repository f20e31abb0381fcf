#include "ops/quantize.h"

#include <ATen/ops/empty.h>

#include "base/error.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/fp8.h"

namespace dsv3::ops {
namespace {

using kernels::kFp8Tile;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
int64_t tiles_of(int64_t size) {
  return (size + kFp8Tile - 1) / kFp8Tile;
}

/// [rows, tiles] with contiguous rows, every tile's column from a multiple of 16 bytes on.
at::Tensor empty_scales(int64_t rows, int64_t tiles, const at::Tensor& like) {
  const NoRecord guard;
  const at::Tensor store = at::empty({tiles, round_up(rows, 4)}, like.options().dtype(at::kFloat));
  return store.t().narrow(0, 0, rows);
}

uint8_t* codes_of(const at::Tensor& data) {
  return static_cast<uint8_t*>(data.mutable_data_ptr());
}

void check_codes(const at::Tensor& data, const char* op) {
  check_shape(data, op, "data", {-1, -1});
  require(data.scalar_type() == at::kFloat8_e4m3fn,
          "[{}] data: expected dtype Float8_e4m3fn, got {}", op, c10::toString(data.scalar_type()));
  require(data.is_contiguous(), "[{}] data: expected a contiguous tensor", op);
}

/// Scales of the layout that empty_scales makes.
void check_tile_scales(const at::Tensor& scales, const at::Tensor& data, const char* op,
                       int64_t rows, int64_t tiles) {
  check_shape(scales, op, "scales", {rows, tiles});
  require(scales.scalar_type() == at::kFloat && scales.device() == data.device(),
          "[{}] scales: expected Float on {}, got {} on {}", op, data.device().str(),
          c10::toString(scales.scalar_type()), scales.device().str());
  require(rows <= 1 || scales.stride(0) == 1, "[{}] scales: expected stride 1 along dim 0, got {}",
          op, scales.stride(0));
}

/// On the host; on a device nobody waits for the ends.
void check_ends(const at::Tensor& ends, int64_t num_rows, const char* op) {
  const auto* end = ends.const_data_ptr<int32_t>();
  for (int64_t e = 0; e < ends.size(0); ++e) {
    const int32_t before = e > 0 ? end[e - 1] : 0;
    require(end[e] >= before && end[e] <= num_rows,
            "[{}] ends[{}]: expected {} to {} (ascending, at most the rows of x), got {}", op, e,
            before, num_rows, end[e]);
  }
}

kernels::RaggedGroups groups_of(const RowGroups& groups, const at::Tensor& x, const char* op) {
  if (!groups.ends.defined()) return {};
  check_shape(groups.ends, op, "ends", {-1});
  check_int32(groups.ends, op, "ends", x);
  const int64_t count = groups.ends.size(0);
  require(count >= 1 && count <= 1024, "[{}] ends: expected 1 to 1024 groups, got {}", op, count);
  require(groups.ends.is_contiguous(), "[{}] ends: expected a contiguous tensor", op);
  if (groups.ends.is_cpu()) check_ends(groups.ends, x.size(0), op);
  return {.num_groups = static_cast<int32_t>(count),
          .ends = groups.ends.const_data_ptr<int32_t>(),
          .padded_rows = padded_group_rows(x.size(0), count)};
}

/// Quantises `x` (codes with `x_scales`, or FP32 and BF16) to the forms that are defined.
void run(const char* op, const at::Tensor& x, const at::Tensor& x_scales,
         const QuantizeOptions& options, const RowGroups& groups, Fp8RowTiles* rows,
         Fp8ColumnTiles* columns) {
  const NoRecord guard;
  kernels::QuantizeTiles p{.num_tokens = x.size(0),
                           .width = x.size(1),
                           .x_stride = x.stride(0),
                           .dtype = dtype_of(x, op, "x"),
                           .x = x.const_data_ptr(),
                           .rule = scale_rule(options, op),
                           .rows = {},
                           .columns = {},
                           .groups = groups_of(groups, x, op)};
  if (x_scales.defined()) {
    p.x_scales = x_scales.const_data_ptr<float>();
    p.x_scale_stride = x_scales.stride(1);
  }
  const int64_t out_rows = p.groups.num_groups > 0 ? p.groups.padded_rows : x.size(0);
  if (rows != nullptr) {
    *rows = empty_row_tiles(out_rows, x.size(1), x);
    p.rows = rows_of(*rows);
  }
  if (columns != nullptr) {
    *columns = empty_column_tiles(out_rows, x.size(1), x);
    p.columns = columns_of(*columns);
  }
  kernels::quantize_tiles(p, stream_of(x));
}

at::Tensor checked_input(const at::Tensor& x, const char* op) {
  check_shape(x, op, "x", {-1, -1});
  require(has_kernel(x), "[{}] x: expected dtype Float or BFloat16, got {}", op,
          c10::toString(x.scalar_type()));
  return rows_contiguous(x.detach());
}

at::Tensor run_dequantize(kernels::Fp8Tiling tiling, const at::Tensor& data,
                          const at::Tensor& scales, int64_t scale_stride, int64_t num_tokens,
                          int64_t width, at::ScalarType dtype) {
  const NoRecord guard;
  require(dtype == at::kFloat || dtype == at::kBFloat16,
          "[dequantize] dtype: expected Float or BFloat16, got {}", c10::toString(dtype));
  at::Tensor y = at::empty({num_tokens, width}, data.options().dtype(dtype));
  kernels::dequantize({.tiling = tiling,
                       .num_tokens = num_tokens,
                       .width = width,
                       .data = static_cast<const uint8_t*>(data.const_data_ptr()),
                       .data_stride = data.size(1),
                       .scales = scales.const_data_ptr<float>(),
                       .scale_stride = scale_stride,
                       .dtype = dtype_of(y, "dequantize", "y"),
                       .y = y.mutable_data_ptr()},
                      stream_of(data));
  return y;
}

}  // namespace

int64_t padded_group_rows(int64_t num_rows, int64_t num_groups) {
  return round_up(num_rows + (kFp8Tile - 1) * num_groups, kFp8Tile);
}

kernels::ScaleRule scale_rule(const QuantizeOptions& options, const char* op) {
  require(options.min_amax >= 0x1p-100 && options.min_amax <= 0x1p100,
          "[{}] min_amax: expected a number in [2^-100, 2^100], got {}", op, options.min_amax);
  return {.min_amax = static_cast<float>(options.min_amax), .power_of_two = options.power_of_two};
}

kernels::Fp8Rows rows_of(const Fp8RowTiles& tiles) {
  return {.data = codes_of(tiles.data),
          .scales = tiles.scales.mutable_data_ptr<float>(),
          .scale_stride = tiles.scales.stride(1)};
}

kernels::Fp8Columns columns_of(const Fp8ColumnTiles& tiles) {
  return {.data = codes_of(tiles.data),
          .scales = tiles.scales.mutable_data_ptr<float>(),
          .scale_stride = tiles.scales.stride(1)};
}

at::Tensor gradient_carrier(at::IntArrayRef sizes, const at::Tensor& like) {
  const NoRecord guard;
  return at::empty({1}, like.options()).expand(sizes);
}

Fp8RowTiles empty_row_tiles(int64_t num_tokens, int64_t width, const at::Tensor& like) {
  return {at::empty({num_tokens, width}, like.options().dtype(at::kFloat8_e4m3fn)),
          empty_scales(num_tokens, tiles_of(width), like)};
}

Fp8ColumnTiles empty_column_tiles(int64_t num_tokens, int64_t width, const at::Tensor& like) {
  const int64_t padded = round_up(num_tokens, kFp8Tile);
  return {at::empty({width, padded}, like.options().dtype(at::kFloat8_e4m3fn)),
          empty_scales(width, padded / kFp8Tile, like)};
}

Fp8RowTiles quantize_rows(const at::Tensor& x, const QuantizeOptions& options,
                          const RowGroups& groups) {
  Fp8RowTiles rows;
  run("quantize_rows", checked_input(x, "quantize_rows"), {}, options, groups, &rows, nullptr);
  return rows;
}

Fp8ColumnTiles quantize_columns(const at::Tensor& x, const QuantizeOptions& options,
                                const RowGroups& groups) {
  Fp8ColumnTiles columns;
  run("quantize_columns", checked_input(x, "quantize_columns"), {}, options, groups, nullptr,
      &columns);
  return columns;
}

std::pair<Fp8RowTiles, Fp8ColumnTiles> quantize_both(const at::Tensor& x,
                                                     const QuantizeOptions& options,
                                                     const RowGroups& groups) {
  std::pair<Fp8RowTiles, Fp8ColumnTiles> both;
  run("quantize_both", checked_input(x, "quantize_both"), {}, options, groups, &both.first,
      &both.second);
  return both;
}

Fp8ColumnTiles requantize_columns(const Fp8RowTiles& x, const QuantizeOptions& options,
                                  const RowGroups& groups) {
  check_codes(x.data, "requantize_columns");
  check_tile_scales(x.scales, x.data, "requantize_columns", x.data.size(0),
                    tiles_of(x.data.size(1)));
  Fp8ColumnTiles columns;
  run("requantize_columns", x.data, x.scales, options, groups, nullptr, &columns);
  return columns;
}

Fp8BlockTiles quantize_blocks(const at::Tensor& input, const QuantizeOptions& options) {
  const NoRecord guard;
  const at::Tensor x = checked_input(input, "quantize_blocks");
  const int64_t N = x.size(0), K = x.size(1);
  const Fp8BlockTiles blocks{at::empty({N, K}, x.options().dtype(at::kFloat8_e4m3fn)),
                             at::empty({tiles_of(N), tiles_of(K)}, x.options().dtype(at::kFloat))};
  kernels::quantize_blocks({.num_rows = N,
                            .width = K,
                            .x_stride = x.stride(0),
                            .dtype = dtype_of(x, "quantize_blocks", "x"),
                            .x = x.const_data_ptr(),
                            .rule = scale_rule(options, "quantize_blocks"),
                            .data = codes_of(blocks.data),
                            .scales = blocks.scales.mutable_data_ptr<float>(),
                            .scale_stride = tiles_of(K)},
                           stream_of(x));
  return blocks;
}

at::Tensor dequantize(const Fp8RowTiles& x, at::ScalarType dtype) {
  check_codes(x.data, "dequantize");
  const int64_t T = x.data.size(0), K = x.data.size(1);
  check_tile_scales(x.scales, x.data, "dequantize", T, tiles_of(K));
  return run_dequantize(kernels::Fp8Tiling::kRows, x.data, x.scales, x.scales.stride(1), T, K,
                        dtype);
}

at::Tensor dequantize(const Fp8ColumnTiles& x, at::ScalarType dtype, int64_t num_tokens) {
  check_codes(x.data, "dequantize");
  const int64_t K = x.data.size(0), padded = x.data.size(1);
  require(padded % kFp8Tile == 0, "[dequantize] data: expected a multiple of 128 tokens, got {}",
          padded);
  require(num_tokens >= 0 && num_tokens <= padded,
          "[dequantize] num_tokens: expected 0 to {}, got {}", padded, num_tokens);
  check_tile_scales(x.scales, x.data, "dequantize", K, padded / kFp8Tile);
  return run_dequantize(kernels::Fp8Tiling::kColumns, x.data, x.scales, x.scales.stride(1),
                        num_tokens, K, dtype);
}

at::Tensor dequantize(const Fp8BlockTiles& x, at::ScalarType dtype) {
  check_codes(x.data, "dequantize");
  const int64_t N = x.data.size(0), K = x.data.size(1);
  check_shape(x.scales, "dequantize", "scales", {tiles_of(N), tiles_of(K)});
  require(x.scales.scalar_type() == at::kFloat && x.scales.device() == x.data.device() &&
              x.scales.is_contiguous(),
          "[dequantize] scales: expected contiguous Float on {}", x.data.device().str());
  return run_dequantize(kernels::Fp8Tiling::kBlocks, x.data, x.scales, tiles_of(K), N, K, dtype);
}

}  // namespace dsv3::ops
