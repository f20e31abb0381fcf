#include "ops/weight_grad.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "ops/autograd.h"

namespace dsv3::ops {

void add_weight_grad(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& grad) {
  if (!grad.defined() || dy.size(0) == 0) return;
  const NoRecord guard;
  if (grad.scalar_type() == dy.scalar_type()) {
    at::Tensor bucket = grad;
    at::addmm_out(bucket, grad, dy.t(), x);
  } else if (grad.is_cuda()) {
    at::Tensor bucket = grad;
    at::addmm_out(bucket, grad, dy.t(), x, grad.scalar_type());
  } else {
    grad.add_(at::mm(dy.t(), x));
  }
}

void add_grouped_weight_grad(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& offsets,
                             const at::Tensor& grad) {
  if (!grad.defined()) return;
  const NoRecord guard;
  if (dy.is_cuda() && dy.scalar_type() == at::kBFloat16) {
    grad.add_(at::_grouped_mm(dy.t(), x, offsets));
    return;
  }
  // Note: reading the offsets costs a copy to the host, which is free on the CPU and, on CUDA,
  // happens only for dtypes that training on a GPU does not use.
  const at::Tensor ends = offsets.cpu();
  const auto* end = ends.const_data_ptr<int32_t>();
  for (int64_t expert = 0, begin = 0; expert < grad.size(0); begin = end[expert++]) {
    const int64_t rows = end[expert] - begin;
    add_weight_grad(dy.narrow(0, begin, rows), x.narrow(0, begin, rows), grad.select(0, expert));
  }
}

}  // namespace dsv3::ops
