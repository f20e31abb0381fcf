#include "ops/linear.h"

#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "base/error.h"
#include "ops/autograd.h"
#include "ops/range.h"
#include "ops/weight_grad.h"

namespace dsv3::ops {
namespace {

void check_linear(const char* name, const at::Tensor& x, const at::Tensor& weight) {
  require(x.dim() == 2 && x.size(1) == weight.size(-1),
          "[{}] x: expected [T, {}] (the weight's last dim), got {} dims with last {}", name,
          weight.size(-1), x.dim(), x.size(-1));
  require(x.scalar_type() == weight.scalar_type(), "[{}] x is {} but the weight is {}", name,
          c10::toString(x.scalar_type()), c10::toString(weight.scalar_type()));
}

/// One product per expert; `weights` [E, K, N]. On CUDA in BF16 one grouped kernel reads the
/// offsets there.
at::Tensor grouped_product(const at::Tensor& x, const at::Tensor& weights,
                           const at::Tensor& offsets) {
  if (x.is_cuda() && x.scalar_type() == at::kBFloat16) return at::_grouped_mm(x, weights, offsets);
  at::Tensor y = at::empty({x.size(0), weights.size(2)}, x.options());
  const at::Tensor ends = offsets.cpu();
  const auto* end = ends.const_data_ptr<int32_t>();
  int64_t begin = 0;
  for (int64_t expert = 0; expert < weights.size(0); begin = end[expert++]) {
    const int64_t rows = end[expert] - begin;
    if (rows == 0) continue;
    at::Tensor out = y.narrow(0, begin, rows);
    at::mm_out(out, x.narrow(0, begin, rows), weights.select(0, expert));
  }
  if (begin < x.size(0)) y.narrow(0, begin, x.size(0) - begin).zero_();
  return y;
}

}  // namespace

at::Tensor linear(const Remakable& x, const Weight& weight) {
  const Range range("linear");
  check_linear("linear", x.value, weight.value);
  at::Tensor y;
  {
    const NoRecord guard;
    y = at::mm(x.value, weight.value.t());
  }
  if (!recording({x.value, weight.value})) return y;
  const bool needs_dx = x.value.requires_grad();
  auto saved = x.remake ? at::Tensor() : x.value.detach();
  record("linear", {x.value, weight.value}, {y},
         [saved, remake = x.remake, weight, needs_dx](const Tensors& grads) -> Tensors {
           const at::Tensor& dy = grads[0];
           if (!dy.defined()) return {at::Tensor(), at::Tensor()};
           at::Tensor dx;
           if (needs_dx) dx = at::mm(dy, weight.value);
           if (weight.grad.defined()) add_weight_grad(dy, remake ? remake() : saved, weight.grad);
           return {dx, at::Tensor()};
         });
  return y;
}

at::Tensor linear(const at::Tensor& x, const Weight& weight) {
  return linear(Remakable{x, {}}, weight);
}

at::Tensor grouped_linear(const Remakable& x, const Weight& weight, const at::Tensor& offsets) {
  const Range range("grouped_linear");
  check_linear("grouped_linear", x.value, weight.value);
  require(offsets.dim() == 1 && offsets.size(0) == weight.value.size(0),
          "[grouped_linear] offsets: expected [{}] (= experts), got [{}]", weight.value.size(0),
          offsets.numel());
  at::Tensor y;
  {
    const NoRecord guard;
    y = grouped_product(x.value, weight.value.transpose(1, 2), offsets);
  }
  if (!recording({x.value, weight.value})) return y;
  const bool needs_dx = x.value.requires_grad();
  auto saved = x.remake ? at::Tensor() : x.value.detach();
  record("grouped_linear", {x.value, weight.value}, {y},
         [saved, remake = x.remake, weight, offsets, needs_dx](const Tensors& grads) -> Tensors {
           if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
           const at::Tensor dy = grads[0].contiguous();
           at::Tensor dx;
           if (needs_dx) dx = grouped_product(dy, weight.value, offsets);
           if (weight.grad.defined()) {
             add_grouped_weight_grad(dy, remake ? remake() : saved, offsets, weight.grad);
           }
           return {dx, at::Tensor()};
         });
  return y;
}

}  // namespace dsv3::ops
