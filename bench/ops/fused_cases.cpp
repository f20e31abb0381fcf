// What RMSNorm and SwiGLU do besides in the same pass: FP8 results, a second norm, routing weights.
#include <ATen/TensorOperators.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/silu.h>

#include "bench/ops/case.h"
#include "bench/ops/composed.h"
#include "bench/ops/fp8.h"
#include "kernels/elementwise.h"
#include "ops/swiglu_fp8.h"

namespace dsv3::bench {
namespace {

constexpr float kEps = 1e-6f;

std::vector<std::pair<const char*, int64_t>> norm_dims(const Problem& p) {
  return {{"T", p.tokens}, {"D", p.shape.hidden}};
}

Plan plan_norm_fp8(const Problem& p) {
  const int64_t T = p.tokens, D = p.shape.hidden;
  return {norm_dims(p), T * D * (p.element() + 1) + scale_bytes(T, D) + D * p.element()};
}

/// The norm of x [T, D], without outputs but 1/rms.
kernels::RmsNormForward norm_of(Setup& s, const at::Tensor& x, const at::Tensor& weight) {
  return {.num_tokens = x.size(0),
          .hidden = x.size(1),
          .x_stride = x.size(1),
          .eps = kEps,
          .dtype = s.problem.dtype,
          .x = x.const_data_ptr(),
          .residual = nullptr,
          .weight = weight.const_data_ptr(),
          .sum = nullptr,
          .y = nullptr,
          .inv_rms = s.empty({x.size(0)}, at::kFloat).mutable_data_ptr<float>()};
}

Work make_norm_fp8(Setup& s) {
  const int64_t T = s.problem.tokens, D = s.problem.shape.hidden;
  const at::Tensor x = s.normal({T, D}), weight = s.normal({D});
  auto p = norm_of(s, x, weight);
  p.rule = default_rule();
  p.quantized = fp8_rows(s, T, D);
  return {[p, stream = s.stream()] { kernels::rms_norm_forward(p, stream); },
          composed_forward([=] { composed_rows(at::rms_norm(x, {D}, weight, kEps)); })};
}

Plan plan_pair_forward(const Problem& p) {
  const int64_t T = p.tokens, D = p.shape.hidden;
  return {norm_dims(p), (3 * T * D + 2 * D) * p.element() + 4 * T};
}

Plan plan_pair_backward(const Problem& p) {
  const int64_t T = p.tokens, D = p.shape.hidden;
  return {norm_dims(p), (4 * T * D + 2 * D) * p.element() + 4 * T + 2 * 2 * 4 * D};
}

Work make_pair_forward(Setup& s) {
  const int64_t T = s.problem.tokens, D = s.problem.shape.hidden;
  const at::Tensor x = s.normal({T, D}), first = s.normal({D}), second = s.normal({D});
  auto p = norm_of(s, x, first);
  p.y = s.empty({T, D}).mutable_data_ptr();
  p.second_weight = second.const_data_ptr();
  p.second_y = s.empty({T, D}).mutable_data_ptr();
  return {[p, stream = s.stream()] { kernels::rms_norm_forward(p, stream); }, composed_forward([=] {
            at::rms_norm(x, {D}, first, kEps);
            at::rms_norm(x, {D}, second, kEps);
          })};
}

Work make_pair_backward(Setup& s) {
  const int64_t T = s.problem.tokens, D = s.problem.shape.hidden;
  const at::Tensor x = s.normal({T, D}), first = s.normal({D}), second = s.normal({D});
  const at::Tensor dy = s.normal({T, D}), second_dy = s.normal({T, D});
  const at::Tensor inv_rms =
      s.keep(x.to(at::kFloat).square().mean({1}).add(kEps).rsqrt().contiguous());
  const int64_t scratch = kernels::rms_norm_backward_scratch(T, D, /*second=*/true);
  const kernels::RmsNormBackward p{
      .num_tokens = T,
      .hidden = D,
      .x_stride = D,
      .dtype = s.problem.dtype,
      .dy = dy.const_data_ptr(),
      .x = x.const_data_ptr(),
      .weight = first.const_data_ptr(),
      .inv_rms = inv_rms.const_data_ptr<float>(),
      .dsum = nullptr,
      .dx = s.empty({T, D}).mutable_data_ptr(),
      .dweight = s.zeros({D}, at::kFloat).mutable_data_ptr(),
      .dweight_dtype = DType::kF32,
      .scratch = s.empty({scratch}, at::kFloat).mutable_data_ptr<float>(),
      .second_dy = second_dy.const_data_ptr(),
      .second_weight = second.const_data_ptr(),
      .second_dweight = s.zeros({D}, at::kFloat).mutable_data_ptr()};
  const at::Tensor x_leaf = leaf(x), first_leaf = leaf(first), second_leaf = leaf(second);
  const auto forward = [=]() -> std::vector<at::Tensor> {
    return {at::rms_norm(x_leaf, {D}, first_leaf, kEps),
            at::rms_norm(x_leaf, {D}, second_leaf, kEps)};
  };
  return {[p, stream = s.stream()] { kernels::rms_norm_backward(p, stream); },
          composed_backward(forward, {x_leaf, first_leaf, second_leaf}, {dy, second_dy})};
}

/// Rows of the routed experts and their inner size.
std::pair<int64_t, int64_t> expert_sizes(const Problem& p) {
  return {p.tokens * p.shape.choices, p.shape.intermediate};
}

std::vector<std::pair<const char*, int64_t>> swiglu_dims(const Problem& p) {
  const auto [T, I] = expert_sizes(p);
  return {{"T", T}, {"I", I}};
}

/// Bytes of a [T, I] matrix in both FP8 forms; columns are padded to whole tiles.
int64_t both_forms(int64_t T, int64_t I) {
  return T * I + scale_bytes(T, I) + padded_rows(T) * I + scale_bytes(I, T);
}

Plan plan_weighted_forward(const Problem& p) {
  const auto [T, I] = expert_sizes(p);
  return {swiglu_dims(p), 3 * T * I * p.element() + 4 * T};
}

Plan plan_weighted_backward(const Problem& p) {
  const auto [T, I] = expert_sizes(p);
  return {swiglu_dims(p), 5 * T * I * p.element() + 8 * T};
}

Plan plan_swiglu_fp8_forward(const Problem& p) {
  const auto [T, I] = expert_sizes(p);
  return {swiglu_dims(p), 2 * T * I * p.element() + both_forms(T, I) + 4 * T};
}

Plan plan_swiglu_fp8_backward(const Problem& p) {
  const auto [T, I] = expert_sizes(p);
  return {swiglu_dims(p), 3 * T * I * p.element() + both_forms(T, 2 * I) + 8 * T};
}

at::Tensor composed_weighted(const at::Tensor& gate_up, const at::Tensor& row_weight) {
  const auto parts = gate_up.chunk(2, -1);
  return (at::silu(parts[0]) * parts[1] * row_weight.unsqueeze(1)).to(gate_up.scalar_type());
}

/// The weighted SwiGLU of gate_up [T, 2I], and its gradient; without outputs but that of the
/// weights.
kernels::SwigluForward swiglu_of(const Setup& s, const at::Tensor& gate_up,
                                 const at::Tensor& row_weight) {
  return {.num_tokens = gate_up.size(0),
          .intermediate = gate_up.size(1) / 2,
          .dtype = s.problem.dtype,
          .gate_up = gate_up.const_data_ptr(),
          .y = nullptr,
          .row_weight = row_weight.const_data_ptr<float>()};
}
kernels::SwigluBackward swiglu_gradient_of(Setup& s, const at::Tensor& dy,
                                           const at::Tensor& gate_up,
                                           const at::Tensor& row_weight) {
  return {.num_tokens = gate_up.size(0),
          .intermediate = gate_up.size(1) / 2,
          .dtype = s.problem.dtype,
          .dy = dy.const_data_ptr(),
          .gate_up = gate_up.const_data_ptr(),
          .dgate_up = nullptr,
          .row_weight = row_weight.const_data_ptr<float>(),
          .drow_weight = s.empty({gate_up.size(0)}, at::kFloat).mutable_data_ptr<float>()};
}

Work make_weighted_forward(Setup& s) {
  const auto [T, I] = expert_sizes(s.problem);
  const at::Tensor gate_up = s.normal({T, 2 * I}), row_weight = s.normal32({T});
  auto p = swiglu_of(s, gate_up, row_weight);
  p.y = s.empty({T, I}).mutable_data_ptr();
  return {[p, stream = s.stream()] { kernels::swiglu_forward(p, stream); },
          composed_forward([=] { composed_weighted(gate_up, row_weight); })};
}

Work make_weighted_backward(Setup& s) {
  const auto [T, I] = expert_sizes(s.problem);
  const at::Tensor gate_up = s.normal({T, 2 * I}), row_weight = s.normal32({T});
  const at::Tensor dy = s.normal({T, I});
  auto p = swiglu_gradient_of(s, dy, gate_up, row_weight);
  p.dgate_up = s.empty({T, 2 * I}).mutable_data_ptr();
  const at::Tensor input = leaf(gate_up), weight = leaf(row_weight);
  return {[p, stream = s.stream()] { kernels::swiglu_backward(p, stream); },
          composed_backward(
              [=]() -> std::vector<at::Tensor> { return {composed_weighted(input, weight)}; },
              {input, weight}, {dy})};
}

Work make_swiglu_fp8_forward(Setup& s) {
  const auto [T, I] = expert_sizes(s.problem);
  const at::Tensor gate_up = s.normal({T, 2 * I}), row_weight = s.normal32({T});
  auto p = swiglu_of(s, gate_up, row_weight);
  p.rule = default_rule();
  p.rows = fp8_rows(s, T, I);
  p.columns = fp8_columns(s, T, I);
  return {[p, stream = s.stream()] { kernels::swiglu_forward(p, stream); }, composed_forward([=] {
            const at::Tensor y = composed_weighted(gate_up, row_weight);
            composed_rows(y);
            composed_columns(y);
          })};
}

Work make_swiglu_fp8_backward(Setup& s) {
  const auto [T, I] = expert_sizes(s.problem);
  const at::Tensor gate_up = s.normal({T, 2 * I}), row_weight = s.normal32({T});
  const at::Tensor dy = s.normal({T, I});
  const at::Tensor input = leaf(gate_up), weight = leaf(row_weight);
  const auto quantized = [](const std::vector<at::Tensor>& gradients) {
    composed_rows(gradients[0]);
    composed_columns(gradients[0]);
  };
  const auto composed = composed_backward(
      [=]() -> std::vector<at::Tensor> { return {composed_weighted(input, weight)}; },
      {input, weight}, {dy}, quantized);
  // Tiles would hold gradients of both gate and up: the operator takes two passes.
  if (I % kernels::kFp8Tile != 0) {
    return {[=] { ops::swiglu_gradient_fp8(dy, gate_up, row_weight, {}); }, composed};
  }
  const int64_t scratch = kernels::swiglu_backward_scratch(T, I);
  auto p = swiglu_gradient_of(s, dy, gate_up, row_weight);
  p.scratch = s.empty({scratch}, at::kFloat).mutable_data_ptr<float>();
  p.rule = default_rule();
  p.rows = fp8_rows(s, T, 2 * I);
  p.columns = fp8_columns(s, T, 2 * I);
  return {[p, stream = s.stream()] { kernels::swiglu_backward(p, stream); }, composed};
}

constexpr Benchmark kBenchmarks[] = {
    {"rms_norm_fp8_forward", "y = norm(x) * weight in FP8, 1x128 tiles", plan_norm_fp8,
     make_norm_fp8},
    {"rms_norm_pair_forward", "two norms of one input", plan_pair_forward, make_pair_forward},
    {"rms_norm_pair_backward", "their gradients in one pass", plan_pair_backward,
     make_pair_backward},
    {"swiglu_weighted_forward", "silu(gate) * up * the routing weight of the row",
     plan_weighted_forward, make_weighted_forward},
    {"swiglu_weighted_backward", "gradient of gate, up and the routing weight",
     plan_weighted_backward, make_weighted_backward},
    {"swiglu_fp8_forward", "the weighted form in FP8, 1x128 and 128x1 tiles at once",
     plan_swiglu_fp8_forward, make_swiglu_fp8_forward},
    {"swiglu_fp8_backward", "its gradient in FP8, both forms at once", plan_swiglu_fp8_backward,
     make_swiglu_fp8_backward},
};

}  // namespace

std::span<const Benchmark> fused_benchmarks() {
  return kBenchmarks;
}

}  // namespace dsv3::bench
