#include "ops/weight_grad.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "kernels/products.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"

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

bool has_grouped_mm(const at::Tensor& x, int64_t in_size, int64_t out_size) {
  return x.scalar_type() == at::kBFloat16 && x.size(0) > 0 && in_size % 8 == 0 && out_size % 8 == 0;
}

namespace {

void add_grouped_cuda(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& offsets,
                      const at::Tensor& grad) {
  if (has_grouped_mm(x, x.size(1), dy.size(1))) {
    grad.add_(at::_grouped_mm(dy.t(), x, offsets));
    return;
  }
  kernels::cuda::grouped_weight_grad({.num_rows = x.size(0),
                                      .num_experts = static_cast<int32_t>(grad.size(0)),
                                      .in_size = x.size(1),
                                      .out_size = dy.size(1),
                                      .dtype = dtype_of(x, "grouped_linear", "x"),
                                      .grad_dtype = dtype_of(grad, "grouped_linear", "gradient"),
                                      .dy = dy.const_data_ptr(),
                                      .x = x.const_data_ptr(),
                                      .offsets = offsets.const_data_ptr<int32_t>(),
                                      .grad = grad.mutable_data_ptr()},
                                     stream_of(x));
}

}  // namespace

void add_grouped_weight_grad(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& offsets,
                             const at::Tensor& grad) {
  if (!grad.defined()) return;
  const NoRecord guard;
  if (dy.is_cuda()) {
    add_grouped_cuda(dy.contiguous(), x.contiguous(), offsets, grad);
    return;
  }
  const auto* end = offsets.const_data_ptr<int32_t>();
  for (int64_t expert = 0, begin = 0; expert < grad.size(0); begin = end[expert++]) {
    const int64_t rows = end[expert] - begin;
    add_weight_grad(dy.narrow(0, begin, rows), x.narrow(0, begin, rows), grad.select(0, expert));
  }
}

}  // namespace dsv3::ops
