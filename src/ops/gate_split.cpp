#include "ops/gate_split.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "base/error.h"
#include "kernels/routing.h"
#include "ops/dispatch.h"

namespace dsv3::ops {
namespace {

/// out = a · b, or out += a · b, of BF16 matrices with FP32 sums. The host has no such product: it
/// widens the factors, for tests.
void multiply(const at::Tensor& a, const at::Tensor& b, bool add, at::Tensor& out) {
  const double beta = add ? 1.0 : 0.0;
  if (out.is_cuda()) {
    at::addmm_out(out, out, a, b, at::kFloat, beta, 1.0);
  } else {
    at::addmm_out(out, out, a.to(at::kFloat), b.to(at::kFloat), beta, 1.0);
  }
}

/// out (+)= a · b in parts along the sum, each joined in FP32.
void multiply_in_parts(const at::Tensor& a, const at::Tensor& b, bool add, at::Tensor& out) {
  const int64_t length = a.size(1);
  for (int64_t begin = 0; begin < length; begin += kSplitPart) {
    const int64_t size = std::min(kSplitPart, length - begin);
    multiply(a.narrow(1, begin, size), b.narrow(0, begin, size), add || begin > 0, out);
  }
}

/// Terms of x [R, C], under each other ([terms · R, C]) or beside each other ([R, terms · C]).
at::Tensor split(const at::Tensor& x, std::initializer_list<int32_t> terms, bool beside) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const auto count = static_cast<int64_t>(terms.size());
  const at::Tensor packed = x.contiguous();
  at::Tensor y = at::empty({beside ? rows : count * rows, beside ? count * columns : columns},
                           x.options().dtype(at::kBFloat16));
  kernels::SplitBf16 p{.num_rows = rows,
                       .num_columns = columns,
                       .num_terms = static_cast<int32_t>(count),
                       .terms = {},
                       .x = packed.const_data_ptr<float>(),
                       .y = y.mutable_data_ptr(),
                       .row_stride = y.size(1),
                       .term_stride = beside ? columns : rows * columns};
  std::copy(terms.begin(), terms.end(), p.terms);
  kernels::split_bf16(p, stream_of(x));
  return y;
}

}  // namespace

at::Tensor split_product(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t num_tokens = x.size(0), num_experts = weight.size(0);
  const auto options = x.options().dtype(at::kFloat);
  if (num_tokens == 0 || x.size(1) == 0) return at::zeros({num_tokens, num_experts}, options);
  const at::Tensor terms = split(weight, {2, 1, 0}, /*beside=*/false);
  if (3 * num_experts <= 256) {
    at::Tensor y = at::empty({num_tokens, 3 * num_experts}, options);
    multiply_in_parts(x, terms.t(), /*add=*/false, y);
    return y.view({num_tokens, 3, num_experts}).sum(1);
  }
  // The small terms first: their cut-off sums are small too and need no parts.
  at::Tensor y = at::empty({num_tokens, num_experts}, options);
  for (int64_t i = 0; i < 2; ++i) {
    multiply(x, terms.narrow(0, i * num_experts, num_experts).t(), i > 0, y);
  }
  multiply_in_parts(x, terms.narrow(0, 2 * num_experts, num_experts).t(), /*add=*/true, y);
  return y;
}

at::Tensor split_gradient(const at::Tensor& dlogits) {
  return split(dlogits, {0, 0, 1}, /*beside=*/true);
}

at::Tensor split_product_dx(const at::Tensor& terms, const at::Tensor& weight) {
  return at::mm(terms, split(weight, {0, 1, 0}, /*beside=*/false));
}

void add_split_product_dweight(const at::Tensor& terms, const at::Tensor& x,
                               const at::Tensor& grad) {
  const int64_t num_experts = grad.size(0);
  if (x.size(0) == 0) return;
  at::Tensor bucket = grad;
  multiply(terms.narrow(1, 2 * num_experts, num_experts).t(), x, /*add=*/true, bucket);
  multiply_in_parts(terms.narrow(1, num_experts, num_experts).t(), x, /*add=*/true, bucket);
}

}  // namespace dsv3::ops
