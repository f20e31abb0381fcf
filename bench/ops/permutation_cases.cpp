// Tokens laid out expert by expert, and back.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>

#include "bench/ops/case.h"
#include "bench/ops/composed.h"
#include "kernels/routing.h"
#include "ops/permute.h"

namespace dsv3::bench {
namespace {

std::vector<std::pair<const char*, int64_t>> row_dims(const Problem& p) {
  return {{"T", p.tokens}, {"K", p.shape.choices}, {"E", p.shape.experts}, {"D", p.shape.hidden}};
}

int64_t row_bytes(const Problem& p) {
  return p.shape.hidden * p.element();
}

Plan plan_make(const Problem& p) {
  const int64_t choices = p.tokens * p.shape.choices;
  return {{{"T", p.tokens}, {"K", p.shape.choices}, {"E", p.shape.experts}},
          3 * 4 * choices + 2 * 4 * p.shape.experts};
}

/// T rows on one side, T·K on the other, and where each goes.
Plan plan_permute(const Problem& p) {
  const int64_t K = p.shape.choices;
  return {row_dims(p), p.tokens * ((1 + K) * row_bytes(p) + 4 * K)};
}

/// FP8 rows and one FP32 scale per 128 of D.
Plan plan_permute_fp8(const Problem& p) {
  const int64_t K = p.shape.choices, D = p.shape.hidden;
  return {row_dims(p), p.tokens * ((1 + K) * (D + 4 * ((D + 127) / 128)) + 4 * K)};
}

Plan plan_combine_forward(const Problem& p) {
  const int64_t K = p.shape.choices;
  return {row_dims(p), p.tokens * ((2 + K) * row_bytes(p) + 8 * K)};
}

Plan plan_combine_backward(const Problem& p) {
  const int64_t K = p.shape.choices;
  return {row_dims(p), p.tokens * ((1 + 2 * K) * row_bytes(p) + 12 * K)};
}

struct Order {
  at::Tensor row_of;     // [T, K] int32
  at::Tensor choice_of;  // [T·K] int32
};

/// {counts, offsets, row_of, choice_of} of experts [T, K]: a stable sort and its inverse.
std::vector<at::Tensor> composed_order(const at::Tensor& experts, int64_t E) {
  const at::Tensor flat = experts.flatten();
  const at::Tensor choice_of =
      std::get<1>(at::sort(flat, /*stable=*/true, 0, /*descending=*/false));
  const at::Tensor rows = at::arange(flat.numel(), choice_of.options());
  const at::Tensor row_of = at::empty_like(choice_of).scatter_(0, choice_of, rows);
  const at::Tensor counts =
      at::zeros({E}, flat.options()).scatter_add_(0, flat.to(at::kLong), at::ones_like(flat));
  return {counts, at::cumsum(counts, 0), row_of, choice_of};
}

Order make_order(Setup& s) {
  const auto found = composed_order(s.distinct_experts(), s.problem.shape.experts);
  const int64_t T = s.problem.tokens, K = s.problem.shape.choices;
  return {s.keep(found[2].to(at::kInt).view({T, K})), s.keep(found[3].to(at::kInt))};
}

/// make_permutation's parameters with outputs of their own.
kernels::MakePermutation order_parameters(Setup& s, const at::Tensor& experts, int64_t multiple) {
  const int64_t T = s.problem.tokens, E = s.problem.shape.experts, K = s.problem.shape.choices;
  const auto M = static_cast<int32_t>(multiple);
  const auto ints = [&s](at::IntArrayRef sizes) {
    return s.empty(sizes, at::kInt).mutable_data_ptr<int32_t>();
  };
  return {.num_tokens = T,
          .num_experts_per_token = static_cast<int32_t>(K),
          .num_experts = static_cast<int32_t>(E),
          .row_multiple = M,
          .experts = experts.const_data_ptr<int32_t>(),
          .counts = ints({E}),
          .offsets = ints({E}),
          .row_of = ints({T, K}),
          .choice_of = ints({kernels::permutation_rows(T * K, static_cast<int32_t>(E), M)}),
          .workspace = ints({kernels::permutation_workspace(T * K, static_cast<int32_t>(E))})};
}

Work make_permutation_case(Setup& s) {
  const int64_t E = s.problem.shape.experts;
  const at::Tensor experts = s.distinct_experts();
  const auto p = order_parameters(s, experts, /*multiple=*/1);
  return {[p, stream = s.stream()] { kernels::make_permutation(p, stream); },
          composed_forward([=] { composed_order(experts, E); })};
}

/// permute_forward's parameters with rows of their own, without choice_of and scales.
kernels::PermuteForward gather_parameters(Setup& s, const at::Tensor& x, const at::Tensor& row_of,
                                          int64_t num_rows) {
  return {.num_tokens = s.problem.tokens,
          .num_experts_per_token = static_cast<int32_t>(s.problem.shape.choices),
          .hidden = s.problem.shape.hidden,
          .num_rows = num_rows,
          .dtype = s.problem.dtype,
          .x = x.const_data_ptr(),
          .row_of = row_of.const_data_ptr<int32_t>(),
          .y = s.empty({num_rows, s.problem.shape.hidden}).mutable_data_ptr()};
}

Work make_permute_forward(Setup& s) {
  const int64_t T = s.problem.tokens, K = s.problem.shape.choices;
  const Order order = make_order(s);
  const at::Tensor x = s.normal({T, s.problem.shape.hidden});
  const auto p = gather_parameters(s, x, order.row_of, T * K);
  const at::Tensor token_of = s.keep(order.choice_of.floor_divide(K));
  return {[p, stream = s.stream()] { kernels::permute_forward(p, stream); },
          composed_forward([=] { x.index_select(0, token_of); })};
}

Work make_permute_fp8_forward(Setup& s) {
  const int64_t T = s.problem.tokens, K = s.problem.shape.choices, D = s.problem.shape.hidden;
  const int64_t G = (D + 127) / 128;
  const Order order = make_order(s);
  const at::Tensor x = s.keep(s.normal({T, D}).to(at::kFloat8_e4m3fn).view(at::kByte));
  const at::Tensor scales = s.normal32({G, T});
  const kernels::PermuteForward p{
      .num_tokens = T,
      .num_experts_per_token = static_cast<int32_t>(K),
      .hidden = D,
      .dtype = DType::kF8E4M3,
      .x = x.const_data_ptr(),
      .row_of = order.row_of.const_data_ptr<int32_t>(),
      .choice_of = order.choice_of.const_data_ptr<int32_t>(),
      .y = s.empty({T * K, D}, at::kByte).mutable_data_ptr(),
      .num_scales = static_cast<int32_t>(G),
      .x_scales = scales.const_data_ptr<float>(),
      .x_scale_stride = T,
      .y_scales = s.empty({G, T * K}, at::kFloat).mutable_data_ptr<float>(),
      .y_scale_stride = T * K};
  const at::Tensor token_of = s.keep(order.choice_of.floor_divide(K));
  return {[p, stream = s.stream()] { kernels::permute_forward(p, stream); }, composed_forward([=] {
            x.index_select(0, token_of);
            scales.index_select(1, token_of);
          })};
}

/// Without weights combine is the gradient of permute.
Work make_permute_backward(Setup& s) {
  const int64_t T = s.problem.tokens, K = s.problem.shape.choices, D = s.problem.shape.hidden;
  const Order order = make_order(s);
  const at::Tensor dy = s.normal({T * K, D});
  const kernels::CombineForward p{.num_tokens = T,
                                  .num_experts_per_token = static_cast<int32_t>(K),
                                  .hidden = D,
                                  .dtype = s.problem.dtype,
                                  .rows = dy.const_data_ptr(),
                                  .weights = nullptr,
                                  .row_of = order.row_of.const_data_ptr<int32_t>(),
                                  .base = nullptr,
                                  .y = s.empty({T, D}).mutable_data_ptr()};
  const at::Tensor input = leaf(s.empty({T, D}));
  const at::Tensor token_of = s.keep(order.choice_of.floor_divide(K));
  return {[p, stream = s.stream()] { kernels::combine_forward(p, stream); },
          composed_backward(
              [=]() -> std::vector<at::Tensor> { return {input.index_select(0, token_of)}; },
              {input}, {dy})};
}

/// base + Σ_k weights · rows.
at::Tensor composed_combine(const at::Tensor& rows, const at::Tensor& weights,
                            const at::Tensor& row_of, const at::Tensor& base) {
  const at::Tensor chosen =
      rows.index_select(0, row_of.flatten()).view({row_of.size(0), row_of.size(1), rows.size(1)});
  return base + (chosen * weights.unsqueeze(-1).to(rows.scalar_type())).sum(1);
}

Work make_combine_forward(Setup& s) {
  const int64_t T = s.problem.tokens, K = s.problem.shape.choices, D = s.problem.shape.hidden;
  const Order order = make_order(s);
  const at::Tensor rows = s.normal({T * K, D}), base = s.normal({T, D});
  const at::Tensor weights = s.normal32({T, K});
  const kernels::CombineForward p{.num_tokens = T,
                                  .num_experts_per_token = static_cast<int32_t>(K),
                                  .hidden = D,
                                  .dtype = s.problem.dtype,
                                  .rows = rows.const_data_ptr(),
                                  .weights = weights.const_data_ptr<float>(),
                                  .row_of = order.row_of.const_data_ptr<int32_t>(),
                                  .base = base.const_data_ptr(),
                                  .y = s.empty({T, D}).mutable_data_ptr()};
  return {[p, stream = s.stream()] { kernels::combine_forward(p, stream); },
          composed_forward([=] { composed_combine(rows, weights, order.row_of, base); })};
}

Work make_combine_backward(Setup& s) {
  const int64_t T = s.problem.tokens, K = s.problem.shape.choices, D = s.problem.shape.hidden;
  const Order order = make_order(s);
  const at::Tensor rows = s.normal({T * K, D}), dy = s.normal({T, D});
  const at::Tensor weights = s.normal32({T, K});
  const kernels::CombineBackward p{
      .num_tokens = T,
      .num_experts_per_token = static_cast<int32_t>(K),
      .hidden = D,
      .dtype = s.problem.dtype,
      .dy = dy.const_data_ptr(),
      .rows = rows.const_data_ptr(),
      .weights = weights.const_data_ptr<float>(),
      .row_of = order.row_of.const_data_ptr<int32_t>(),
      .drows = s.empty({T * K, D}).mutable_data_ptr(),
      .dweights = s.empty({T, K}, at::kFloat).mutable_data_ptr<float>()};
  const at::Tensor rows_leaf = leaf(rows), weights_leaf = leaf(weights);
  const auto forward = [=]() -> std::vector<at::Tensor> {
    return {composed_combine(rows_leaf, weights_leaf, order.row_of, dy)};
  };
  return {[p, stream = s.stream()] { kernels::combine_backward(p, stream); },
          composed_backward(forward, {rows_leaf, weights_leaf}, {dy})};
}

/// Rows of one expert begin at multiples of this, as FP8 products want them.
constexpr int64_t kMultiple = 128;

int64_t padded_total(const Problem& p) {
  return kernels::permutation_rows(p.tokens * p.shape.choices,
                                   static_cast<int32_t>(p.shape.experts), kMultiple);
}

std::vector<std::pair<const char*, int64_t>> padded_dims(const Problem& p) {
  auto dims = row_dims(p);
  dims.emplace_back("Rows", padded_total(p));
  return dims;
}

Plan plan_make_padded(const Problem& p) {
  const int64_t choices = p.tokens * p.shape.choices;
  return {padded_dims(p), 4 * (2 * choices + padded_total(p) + 2 * p.shape.experts)};
}

Plan plan_permute_padded(const Problem& p) {
  return {padded_dims(p), (p.tokens + padded_total(p)) * row_bytes(p) +
                              4 * (p.tokens * p.shape.choices + padded_total(p))};
}

/// {row_of, choice_of} with each expert's rows at a multiple of 128; -1 for padding.
std::vector<at::Tensor> composed_padded_order(const at::Tensor& experts, int64_t E, int64_t rows) {
  const auto order = composed_order(experts, E);
  const at::Tensor extra =
      order[0].add(kMultiple - 1).floor_divide(kMultiple).mul(kMultiple).sub(order[0]);
  const at::Tensor shift = at::cumsum(extra, 0).sub(extra);
  const at::Tensor row_of = order[2] + shift.index_select(0, experts.flatten());
  const at::Tensor choices = at::arange(row_of.numel(), row_of.options());
  return {row_of, at::full({rows}, -1, row_of.options()).scatter_(0, row_of, choices)};
}

Work make_padded(Setup& s) {
  const int64_t E = s.problem.shape.experts, rows = padded_total(s.problem);
  const at::Tensor experts = s.distinct_experts();
  const auto p = order_parameters(s, experts, kMultiple);
  return {[p, stream = s.stream()] { kernels::make_permutation(p, stream); },
          composed_forward([=] { composed_padded_order(experts, E, rows); })};
}

Work make_permute_padded(Setup& s) {
  const auto order =
      ops::make_permutation(s.distinct_experts(), s.problem.shape.experts, kMultiple);
  const at::Tensor row_of = s.keep(order.row_of), choice_of = s.keep(order.choice_of);
  const at::Tensor x = s.normal({s.problem.tokens, s.problem.shape.hidden});
  auto p = gather_parameters(s, x, row_of, padded_total(s.problem));
  p.choice_of = choice_of.const_data_ptr<int32_t>();
  const at::Tensor padding = s.keep(choice_of.lt(0).unsqueeze(1));
  const at::Tensor tokens = s.keep(choice_of.clamp_min(0).floor_divide(s.problem.shape.choices));
  return {[p, stream = s.stream()] { kernels::permute_forward(p, stream); },
          composed_forward([=] { x.index_select(0, tokens).masked_fill_(padding, 0); })};
}

constexpr Benchmark kBenchmarks[] = {
    {"make_permutation", "stable order by expert, counts and offsets", plan_make,
     make_permutation_case},
    {"make_permutation_padded", "the same, each expert's rows at a multiple of 128",
     plan_make_padded, make_padded},
    {"permute_forward", "rows gathered into expert order", plan_permute, make_permute_forward},
    {"permute_fp8_forward", "FP8 rows and their scales gathered into expert order",
     plan_permute_fp8, make_permute_fp8_forward},
    {"permute_backward", "each token's K rows summed", plan_permute, make_permute_backward},
    {"permute_padded", "rows gathered with the padding between the experts", plan_permute_padded,
     make_permute_padded},
    {"combine_forward", "base + weighted sum of each token's K rows", plan_combine_forward,
     make_combine_forward},
    {"combine_backward", "gradient of the rows and the weights", plan_combine_backward,
     make_combine_backward},
};

}  // namespace

std::span<const Benchmark> permutation_benchmarks() {
  return kBenchmarks;
}

}  // namespace dsv3::bench
