// RMSNorm and SwiGLU.
#include <ATen/TensorOperators.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/silu.h>

#include "bench/ops/case.h"
#include "bench/ops/composed.h"
#include "kernels/elementwise.h"

namespace dsv3::bench {
namespace {

constexpr float kEps = 1e-6f;

/// What the norm's cases differ in.
struct NormShape {
  int64_t width;   // of a row: D, or C of the latent
  int64_t stride;  // of x's rows
  bool residual;   // added in the same pass
};

NormShape hidden_norm(const Problem& p) {
  return {p.shape.hidden, p.shape.hidden, false};
}
NormShape residual_norm(const Problem& p) {
  return {p.shape.hidden, p.shape.hidden, true};
}
/// The K/V latent stands beside the shared rotary key: rows of C within rows of C + R.
NormShape latent_norm(const Problem& p) {
  return {p.shape.kv_rank, p.shape.kv_rank + p.shape.rope, false};
}

template <NormShape (*shape_of)(const Problem&)>
Plan plan_norm_forward(const Problem& p) {
  const NormShape n = shape_of(p);
  const int64_t passes = n.residual ? 4 : 2;
  return {{{"T", p.tokens}, {"D", n.width}, {"stride", n.stride}},
          passes * p.tokens * n.width * p.element() + n.width * p.element() + 4 * p.tokens};
}

template <NormShape (*shape_of)(const Problem&)>
Plan plan_norm_backward(const Problem& p) {
  const NormShape n = shape_of(p);
  const int64_t passes = n.residual ? 4 : 3, dweight = 2 * 4 * n.width;
  return {
      {{"T", p.tokens}, {"D", n.width}, {"stride", n.stride}},
      passes * p.tokens * n.width * p.element() + n.width * p.element() + 4 * p.tokens + dweight};
}

at::Tensor strided_rows(Setup& s, const NormShape& n) {
  return s.normal({s.problem.tokens, n.stride}).narrow(1, 0, n.width);
}

template <NormShape (*shape_of)(const Problem&)>
Work make_norm_forward(Setup& s) {
  const NormShape n = shape_of(s.problem);
  const int64_t T = s.problem.tokens, D = n.width;
  const at::Tensor x = strided_rows(s, n), weight = s.normal({D}), y = s.empty({T, D});
  const at::Tensor residual = n.residual ? s.normal({T, D}) : at::Tensor();
  const at::Tensor sum = n.residual ? s.empty({T, D}) : at::Tensor();
  const kernels::RmsNormForward p{.num_tokens = T,
                                  .hidden = D,
                                  .x_stride = n.stride,
                                  .eps = kEps,
                                  .dtype = s.problem.dtype,
                                  .x = x.const_data_ptr(),
                                  .residual = n.residual ? residual.const_data_ptr() : nullptr,
                                  .weight = weight.const_data_ptr(),
                                  .sum = n.residual ? sum.mutable_data_ptr() : nullptr,
                                  .y = y.mutable_data_ptr(),
                                  .inv_rms = s.empty({T}, at::kFloat).mutable_data_ptr<float>()};
  return {[p, stream = s.stream()] { kernels::rms_norm_forward(p, stream); }, composed_forward([=] {
            at::rms_norm(residual.defined() ? x + residual : x, {D}, weight, kEps);
          })};
}

template <NormShape (*shape_of)(const Problem&)>
Work make_norm_backward(Setup& s) {
  const NormShape n = shape_of(s.problem);
  const int64_t T = s.problem.tokens, D = n.width;
  const at::Tensor x = strided_rows(s, n), weight = s.normal({D}), dy = s.normal({T, D});
  const at::Tensor dsum = n.residual ? s.normal({T, D}) : at::Tensor();
  const at::Tensor residual = n.residual ? s.normal({T, D}) : at::Tensor();
  const at::Tensor inv_rms =
      s.keep(x.to(at::kFloat).square().mean({1}).add(kEps).rsqrt().contiguous());
  const int64_t scratch = kernels::rms_norm_backward_scratch(T, D);
  const kernels::RmsNormBackward p{
      .num_tokens = T,
      .hidden = D,
      .x_stride = n.stride,
      .dtype = s.problem.dtype,
      .dy = dy.const_data_ptr(),
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .inv_rms = inv_rms.const_data_ptr<float>(),
      .dsum = n.residual ? dsum.const_data_ptr() : nullptr,
      .dx = s.empty({T, D}).mutable_data_ptr(),
      .dweight = s.zeros({D}, at::kFloat).mutable_data_ptr(),
      .dweight_dtype = DType::kF32,
      .scratch = s.empty({scratch}, at::kFloat).mutable_data_ptr<float>()};
  const at::Tensor x_leaf = leaf(x), weight_leaf = leaf(weight);
  const auto forward = [=]() -> std::vector<at::Tensor> {
    if (!residual.defined()) return {at::rms_norm(x_leaf, {D}, weight_leaf, kEps)};
    const at::Tensor sum = x_leaf + residual;
    return {at::rms_norm(sum, {D}, weight_leaf, kEps), sum};
  };
  std::vector<at::Tensor> upstream{dy};
  if (dsum.defined()) upstream.push_back(dsum);
  return {[p, stream = s.stream()] { kernels::rms_norm_backward(p, stream); },
          composed_backward(forward, {x_leaf, weight_leaf}, upstream)};
}

/// Rows of the routed experts: every token is there K times.
int64_t expert_rows(const Problem& p) {
  return p.tokens * p.shape.choices;
}

Plan plan_swiglu_forward(const Problem& p) {
  const int64_t rows = expert_rows(p), I = p.shape.intermediate;
  return {{{"T", rows}, {"I", I}}, 3 * rows * I * p.element()};
}

Plan plan_swiglu_backward(const Problem& p) {
  const int64_t rows = expert_rows(p), I = p.shape.intermediate;
  return {{{"T", rows}, {"I", I}}, 5 * rows * I * p.element()};
}

at::Tensor composed_swiglu(const at::Tensor& gate_up) {
  const auto parts = gate_up.chunk(2, -1);
  return at::silu(parts[0]) * parts[1];
}

Work make_swiglu_forward(Setup& s) {
  const int64_t rows = expert_rows(s.problem), I = s.problem.shape.intermediate;
  const at::Tensor gate_up = s.normal({rows, 2 * I});
  const kernels::SwigluForward p{.num_tokens = rows,
                                 .intermediate = I,
                                 .dtype = s.problem.dtype,
                                 .gate_up = gate_up.const_data_ptr(),
                                 .y = s.empty({rows, I}).mutable_data_ptr()};
  return {[p, stream = s.stream()] { kernels::swiglu_forward(p, stream); },
          composed_forward([gate_up] { composed_swiglu(gate_up); })};
}

Work make_swiglu_backward(Setup& s) {
  const int64_t rows = expert_rows(s.problem), I = s.problem.shape.intermediate;
  const at::Tensor gate_up = s.normal({rows, 2 * I}), dy = s.normal({rows, I});
  const kernels::SwigluBackward p{.num_tokens = rows,
                                  .intermediate = I,
                                  .dtype = s.problem.dtype,
                                  .dy = dy.const_data_ptr(),
                                  .gate_up = gate_up.const_data_ptr(),
                                  .dgate_up = s.empty({rows, 2 * I}).mutable_data_ptr()};
  const at::Tensor input = leaf(gate_up);
  return {[p, stream = s.stream()] { kernels::swiglu_backward(p, stream); },
          composed_backward([=]() -> std::vector<at::Tensor> { return {composed_swiglu(input)}; },
                            {input}, {dy})};
}

constexpr Benchmark kBenchmarks[] = {
    {"rms_norm_forward", "y = norm(x) * weight over the hidden size",
     plan_norm_forward<hidden_norm>, make_norm_forward<hidden_norm>},
    {"rms_norm_backward", "dx and the weight's gradient", plan_norm_backward<hidden_norm>,
     make_norm_backward<hidden_norm>},
    {"rms_norm_residual_forward", "sum = x + residual, y = norm(sum) * weight",
     plan_norm_forward<residual_norm>, make_norm_forward<residual_norm>},
    {"rms_norm_residual_backward", "the same backwards, the sum's gradient joined",
     plan_norm_backward<residual_norm>, make_norm_backward<residual_norm>},
    {"rms_norm_latent_forward", "norm over the K/V latent, a strided part of its rows",
     plan_norm_forward<latent_norm>, make_norm_forward<latent_norm>},
    {"rms_norm_latent_backward", "the same backwards", plan_norm_backward<latent_norm>,
     make_norm_backward<latent_norm>},
    {"swiglu_forward", "silu(gate) * up on the rows of the routed experts", plan_swiglu_forward,
     make_swiglu_forward},
    {"swiglu_backward", "gradient of gate and up", plan_swiglu_backward, make_swiglu_backward},
};

}  // namespace

std::span<const Benchmark> elementwise_benchmarks() {
  return kBenchmarks;
}

}  // namespace dsv3::bench
