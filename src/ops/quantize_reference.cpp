// The plain form of FP8 tiles: LibTorch's own operators on padded FP32 tensors.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "kernels/quantize.h"
#include "ops/quantize.h"

namespace dsv3::ops::reference {
namespace {

using kernels::kFp8Tile;

int64_t round_up(int64_t value) {
  return (value + kFp8Tile - 1) / kFp8Tile * kFp8Tile;
}

/// FP32, zeros up to multiples of 128 both ways.
at::Tensor padded(const at::Tensor& x) {
  const int64_t T = x.size(0), K = x.size(1);
  return at::constant_pad_nd(x.detach().to(at::kFloat), {0, round_up(K) - K, 0, round_up(T) - T});
}

/// The groups' rows, each moved to where its multiple of 128 begins.
at::Tensor spread(const at::Tensor& x, const RowGroups& groups) {
  if (!groups.ends.defined()) return x;
  const at::Tensor ends = groups.ends.cpu();
  at::Tensor out = at::zeros({padded_group_rows(x.size(0), ends.size(0)), x.size(1)}, x.options());
  int64_t begin = 0, to = 0;
  for (int64_t e = 0; e < ends.size(0); ++e) {
    const int64_t rows = ends.const_data_ptr<int32_t>()[e] - begin;
    out.narrow(0, to, rows).copy_(x.narrow(0, begin, rows));
    begin += rows;
    to += round_up(rows);
  }
  return out;
}

struct Coded {
  at::Tensor codes, scales;  // scales keep the reduced dims as 1
};

/// Scales of x over `dims`, and x's codes.
Coded code(const at::Tensor& x, at::IntArrayRef dims, const QuantizeOptions& options) {
  const at::Tensor numbers = at::where(x.isnan(), at::zeros({}, x.options()), x);
  const at::Tensor amax = numbers.abs().amax(dims, /*keepdim=*/true).clamp_min(options.min_amax);
  at::Tensor scale = amax.div(448.0), inverse = at::full_like(amax, 448.0).div(amax);
  if (options.power_of_two) {
    // The next power of two of a float, by its exponent.
    at::Tensor up = scale.cpu().contiguous().clone();
    float* data = up.mutable_data_ptr<float>();
    for (int64_t i = 0; i < up.numel(); ++i) {
      if (!std::isfinite(data[i])) continue;
      int exponent = 0;
      const float fraction = std::frexp(data[i], &exponent);  // in [0.5, 1)
      data[i] = std::ldexp(1.0f, fraction == 0.5f ? exponent - 1 : exponent);
    }
    scale = up.to(x.device());
    inverse = at::full_like(scale, 1.0).div(scale);
  }
  const at::Tensor scaled = x.mul(inverse);
  // LibTorch's conversion keeps NaN's sign and has no saturation; nothing but NaN leaves ±448 here.
  const at::Tensor plain = at::where(scaled.isnan(), at::full_like(scaled, NAN).abs(), scaled);
  return {plain.to(at::kFloat8_e4m3fn), scale};
}

/// codes · scales, where a row's scale j belongs to the columns from 128·j on.
at::Tensor rescale(const at::Tensor& codes, const at::Tensor& scales, at::ScalarType dtype) {
  const at::Tensor wide = scales.repeat_interleave(kFp8Tile, 1).narrow(1, 0, codes.size(1));
  return codes.to(at::kFloat).mul(wide).to(dtype);
}

}  // namespace

Fp8RowTiles quantize_rows(const at::Tensor& input, const QuantizeOptions& options,
                          const RowGroups& groups) {
  const at::Tensor x = spread(input.detach(), groups);
  const int64_t T = x.size(0), K = x.size(1), tiles = round_up(K) / kFp8Tile;
  const Coded coded = code(padded(x).narrow(0, 0, T).reshape({T, tiles, kFp8Tile}), {2}, options);
  return {coded.codes.reshape({T, tiles * kFp8Tile}).narrow(1, 0, K).contiguous(),
          coded.scales.reshape({T, tiles})};
}

Fp8ColumnTiles quantize_columns(const at::Tensor& input, const QuantizeOptions& options,
                                const RowGroups& groups) {
  const at::Tensor x = padded(spread(input.detach(), groups)).narrow(1, 0, input.size(1)).t();
  const int64_t K = x.size(0), tiles = x.size(1) / kFp8Tile;
  const Coded coded = code(x.reshape({K, tiles, kFp8Tile}), {2}, options);
  return {coded.codes.reshape({K, tiles * kFp8Tile}), coded.scales.reshape({K, tiles})};
}

Fp8BlockTiles quantize_blocks(const at::Tensor& x, const QuantizeOptions& options) {
  const int64_t N = x.size(0), K = x.size(1), down = round_up(N) / kFp8Tile,
                across = round_up(K) / kFp8Tile;
  const Coded coded = code(padded(x).reshape({down, kFp8Tile, across, kFp8Tile}), {1, 3}, options);
  return {coded.codes.reshape({down * kFp8Tile, across * kFp8Tile})
              .narrow(0, 0, N)
              .narrow(1, 0, K)
              .contiguous(),
          coded.scales.reshape({down, across})};
}

at::Tensor dequantize(const Fp8RowTiles& x, at::ScalarType dtype) {
  return rescale(x.data, x.scales, dtype);
}

at::Tensor dequantize(const Fp8ColumnTiles& x, at::ScalarType dtype, int64_t num_tokens) {
  return rescale(x.data, x.scales, dtype).narrow(1, 0, num_tokens).t().contiguous();
}

at::Tensor dequantize(const Fp8BlockTiles& x, at::ScalarType dtype) {
  const at::Tensor rows = x.scales.repeat_interleave(kFp8Tile, 0).narrow(0, 0, x.data.size(0));
  return rescale(x.data, rows, dtype);
}

}  // namespace dsv3::ops::reference
