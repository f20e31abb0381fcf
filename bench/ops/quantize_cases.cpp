// FP8 tiles of activations and weights, and the paged latent cache.
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>

#include "bench/ops/case.h"
#include "bench/ops/composed.h"
#include "bench/ops/fp8.h"
#include "kernels/quantize.h"
#include "ops/latent_cache.h"
#include "ops/quantize.h"

namespace dsv3::bench {
namespace {

constexpr int64_t kCacheBlock = 64;  // tokens of a page

std::vector<std::pair<const char*, int64_t>> matrix_dims(int64_t rows, int64_t width) {
  return {{"T", rows}, {"D", width}};
}

/// x [T, D] in, `outputs` FP8 forms of it out.
template <int outputs>
Plan plan_quantize(const Problem& p) {
  const int64_t T = p.tokens, D = p.shape.hidden;
  return {matrix_dims(T, D), T * D * p.element() + outputs * (T * D + scale_bytes(T, D))};
}

/// Quantises x [T, D], without outputs yet.
kernels::QuantizeTiles quantize_of(const Setup& s, const at::Tensor& x) {
  return {.num_tokens = x.size(0),
          .width = x.size(1),
          .x_stride = x.size(1),
          .dtype = s.problem.dtype,
          .x = x.const_data_ptr(),
          .rule = default_rule()};
}

std::function<void()> quantize(const Setup& s, const kernels::QuantizeTiles& p) {
  return [p, stream = s.stream()] { kernels::quantize_tiles(p, stream); };
}

Work make_rows(Setup& s) {
  const at::Tensor x = s.normal({s.problem.tokens, s.problem.shape.hidden});
  auto p = quantize_of(s, x);
  p.rows = fp8_rows(s, p.num_tokens, p.width);
  return {quantize(s, p), composed_forward([x] { composed_rows(x); })};
}

Work make_columns(Setup& s) {
  const at::Tensor x = s.normal({s.problem.tokens, s.problem.shape.hidden});
  auto p = quantize_of(s, x);
  p.columns = fp8_columns(s, p.num_tokens, p.width);
  return {quantize(s, p), composed_forward([x] { composed_columns(x); })};
}

Work make_both(Setup& s) {
  const at::Tensor x = s.normal({s.problem.tokens, s.problem.shape.hidden});
  auto p = quantize_of(s, x);
  p.rows = fp8_rows(s, p.num_tokens, p.width);
  p.columns = fp8_columns(s, p.num_tokens, p.width);
  return {quantize(s, p), composed_forward([x] {
            composed_rows(x);
            composed_columns(x);
          })};
}

/// Rows of the routed experts, which leave in groups padded to multiples of 128.
int64_t group_rows(const Problem& p) {
  return p.tokens * p.shape.choices;
}

Plan plan_groups(const Problem& p) {
  const int64_t rows = group_rows(p), D = p.shape.hidden;
  const int64_t padded = ops::padded_group_rows(rows, p.shape.experts);
  return {{{"T", rows}, {"D", D}, {"E", p.shape.experts}, {"K", p.shape.choices}, {"Tp", padded}},
          rows * D * p.element() + 2 * (padded * D + scale_bytes(padded, D)) + 4 * p.shape.experts};
}

struct Groups {
  at::Tensor ends;          // [E] int32
  at::Tensor destinations;  // [T] the padded row of each row
};

Groups make_groups(Setup& s) {
  const at::Tensor experts = s.distinct_experts().flatten().to(at::kLong);
  const at::Tensor sorted =
      std::get<0>(at::sort(experts, /*stable=*/true, 0, /*descending=*/false));
  const at::Tensor counts = at::zeros({s.problem.shape.experts}, experts.options())
                                .scatter_add_(0, experts, at::ones_like(experts));
  const at::Tensor padded = counts.add(127).floor_divide(128).mul(128);
  const at::Tensor shift = padded.sub(counts).cumsum(0).sub(padded.sub(counts));
  const at::Tensor rows = at::arange(sorted.numel(), sorted.options());
  return {s.keep(counts.cumsum(0).to(at::kInt)), s.keep(rows.add(shift.index_select(0, sorted)))};
}

Work make_grouped(Setup& s) {
  const int64_t rows = group_rows(s.problem), D = s.problem.shape.hidden;
  const int64_t padded = ops::padded_group_rows(rows, s.problem.shape.experts);
  const at::Tensor x = s.normal({rows, D});
  const Groups groups = make_groups(s);
  auto p = quantize_of(s, x);
  p.rows = fp8_rows(s, padded, D);
  p.columns = fp8_columns(s, padded, D);
  p.groups = {.num_groups = static_cast<int32_t>(s.problem.shape.experts),
              .ends = groups.ends.const_data_ptr<int32_t>(),
              .padded_rows = padded};
  return {quantize(s, p), composed_forward([x, groups, padded, D] {
            const at::Tensor whole =
                at::zeros({padded, D}, x.options()).index_copy_(0, groups.destinations, x);
            composed_rows(whole);
            composed_columns(whole);
          })};
}

Plan plan_blocks(const Problem& p) {
  const int64_t D = p.shape.hidden;
  return {matrix_dims(D, D), D * D * p.element() + D * D + scale_bytes(D / 128, D)};
}

Work make_blocks(Setup& s) {
  const at::Tensor x = s.normal({s.problem.shape.hidden, s.problem.shape.hidden}, 0.02);
  const int64_t D = x.size(0), across = padded_rows(D) / kernels::kFp8Tile;
  const kernels::QuantizeBlocks p{
      .num_rows = D,
      .width = D,
      .x_stride = D,
      .dtype = s.problem.dtype,
      .x = x.const_data_ptr(),
      .rule = default_rule(),
      .data = static_cast<uint8_t*>(s.empty({D, D}, at::kByte).mutable_data_ptr()),
      .scales = s.empty({across, across}, at::kFloat).mutable_data_ptr<float>(),
      .scale_stride = across};
  return {[p, stream = s.stream()] { kernels::quantize_blocks(p, stream); },
          composed_forward([x] { composed_blocks(x); })};
}

Plan plan_requantize(const Problem& p) {
  const int64_t T = p.tokens, D = p.shape.hidden;
  return {matrix_dims(T, D), 2 * (T * D + scale_bytes(T, D))};
}

/// x [T, D] in 1×128 tiles.
kernels::Fp8Rows quantized(Setup& s, const at::Tensor& x) {
  auto p = quantize_of(s, x);
  p.rows = fp8_rows(s, p.num_tokens, p.width);
  kernels::quantize_tiles(p, s.stream());
  return p.rows;
}

Work make_requantize(Setup& s) {
  const at::Tensor x = s.normal({s.problem.tokens, s.problem.shape.hidden});
  const kernels::Fp8Rows tiles = quantized(s, x);
  const ComposedTiles same = composed_rows(x);
  auto p = quantize_of(s, x);
  p.dtype = DType::kF8E4M3;
  p.x = tiles.data;
  p.x_scales = tiles.scales;
  p.x_scale_stride = tiles.scale_stride;
  p.columns = fp8_columns(s, p.num_tokens, p.width);
  return {quantize(s, p),
          composed_forward([same] { composed_columns(composed_dequantize(same, at::kFloat)); })};
}

Work make_dequantize(Setup& s) {
  const at::Tensor x = s.normal({s.problem.tokens, s.problem.shape.hidden});
  const kernels::Fp8Rows tiles = quantized(s, x);
  const ComposedTiles same = composed_rows(x);
  const kernels::Dequantize p{.tiling = kernels::Fp8Tiling::kRows,
                              .num_tokens = x.size(0),
                              .width = x.size(1),
                              .data = tiles.data,
                              .data_stride = 0,
                              .scales = tiles.scales,
                              .scale_stride = tiles.scale_stride,
                              .dtype = s.problem.dtype,
                              .y = s.empty(x.sizes()).mutable_data_ptr()};
  return {[p, stream = s.stream()] { kernels::dequantize(p, stream); },
          composed_forward([same, type = x.scalar_type()] { composed_dequantize(same, type); })};
}

/// Bytes of one token in FlashMLA's FP8 layout.
int64_t fp8_slot(const Shape& s) {
  return s.kv_rank + scale_bytes(1, s.kv_rank) + 2 * s.rope;
}

template <bool fp8>
Plan plan_cache(const Problem& p) {
  const int64_t C = p.shape.kv_rank, R = p.shape.rope;
  const int64_t slot = fp8 ? fp8_slot(p.shape) : 2 * (C + R);
  return {{{"T", p.tokens}, {"C", C}, {"R", R}}, p.tokens * ((C + R) * p.element() + 4 + slot)};
}

template <bool fp8>
Work make_cache(Setup& s) {
  const int64_t T = s.problem.tokens, C = s.problem.shape.kv_rank, R = s.problem.shape.rope;
  const int64_t blocks = (T + kCacheBlock - 1) / kCacheBlock;
  const at::Tensor latent = s.normal({T, C}), rope = s.normal({T, R});
  const at::Tensor cache =
      fp8 ? s.zeros({blocks, kCacheBlock, fp8_slot(s.problem.shape)}, at::kByte)
          : s.zeros({blocks, kCacheBlock, C + R}, at::kBFloat16);
  const at::Tensor order = s.keep(at::randperm(T, at::TensorOptions(s.device).dtype(at::kLong)));
  const at::Tensor slots = s.keep(order.to(at::kInt));
  return {[=] { ops::latent_cache_write(latent, rope, slots, cache); }, composed_forward([=] {
            const at::Tensor flat = cache.flatten(0, 1);
            if (!fp8) {
              flat.index_copy_(0, order, at::cat({latent, rope}, 1).to(at::kBFloat16));
              return;
            }
            const ComposedTiles tiles = composed_rows(latent);
            flat.index_copy_(0, order,
                             at::cat({tiles.codes.flatten(1).view(at::kByte),
                                      tiles.scales.flatten(1).view(at::kByte),
                                      rope.to(at::kBFloat16).view(at::kByte)},
                                     1));
          })};
}

constexpr Benchmark kBenchmarks[] = {
    {"quantize_rows", "x to FP8 in 1x128 tiles", plan_quantize<1>, make_rows},
    {"quantize_columns", "x to FP8 in 128x1 tiles, transposed", plan_quantize<1>, make_columns},
    {"quantize_both", "both, reading x once", plan_quantize<2>, make_both},
    {"quantize_grouped", "both, the experts' rows padded to multiples of 128", plan_groups,
     make_grouped},
    {"quantize_blocks", "a weight to FP8 in 128x128 blocks", plan_blocks, make_blocks},
    {"requantize_columns", "1x128 tiles to 128x1 tiles", plan_requantize, make_requantize},
    {"dequantize_rows", "code * scale of 1x128 tiles", plan_quantize<1>, make_dequantize},
    {"latent_cache_write_bf16", "latent and rotated key into a paged cache", plan_cache<false>,
     make_cache<false>},
    {"latent_cache_write_fp8", "the same in FlashMLA's FP8 layout", plan_cache<true>,
     make_cache<true>},
};

}  // namespace

std::span<const Benchmark> quantize_benchmarks() {
  return kBenchmarks;
}

}  // namespace dsv3::bench
