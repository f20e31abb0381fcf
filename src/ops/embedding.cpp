#include "ops/embedding.h"

#include <ATen/ops/empty.h>

#include "kernels/elementwise.h"
#include "ops/autograd.h"
#include "ops/bucket_leaf.h"
#include "ops/dispatch.h"
#include "ops/range.h"

namespace dsv3::ops {
namespace {

void add_embedding_grad(const at::Tensor& grad, const at::Tensor& ids, const at::Tensor& bucket) {
  const at::Tensor dy = grad.contiguous();
  check_bucket(bucket, "embedding", {-1, dy.size(1)}, dy);
  const int64_t T = dy.size(0), V = bucket.size(0), D = dy.size(1);
  const int64_t bytes = kernels::embedding_backward_scratch(T, V, D, dy.is_cuda());
  at::Tensor scratch = at::empty({bytes}, dy.options().dtype(at::kByte));
  kernels::embedding_backward({.num_tokens = T,
                               .vocab = V,
                               .hidden = D,
                               .dtype = dtype_of(dy, "embedding", "gradient"),
                               .dtable_dtype = dtype_of(bucket, "embedding", "weight gradient"),
                               .ids = ids.const_data_ptr<int32_t>(),
                               .dy = dy.const_data_ptr(),
                               .dtable = bucket.mutable_data_ptr(),
                               .scratch = scratch.mutable_data_ptr()},
                              stream_of(dy));
}

}  // namespace

at::Tensor embedding(const at::Tensor& given_ids, const Weight& weight) {
  const Range range("embedding");
  check_shape(given_ids, "embedding", "ids", {-1});
  check_shape(weight.value, "embedding", "weight", {-1, -1});
  check_number(weight.value, "embedding", "weight");
  check_int32(given_ids, "embedding", "ids", weight.value);
  const at::Tensor ids = given_ids.contiguous();
  if (!has_kernel(weight.value)) return reference::embedding(ids, bucket_leaf(weight));
  at::Tensor y;
  {
    const NoRecord guard;
    const at::Tensor table = weight.value.contiguous();
    y = at::empty({ids.size(0), table.size(1)}, table.options());
    kernels::embedding_forward({.num_tokens = ids.size(0),
                                .vocab = table.size(0),
                                .hidden = table.size(1),
                                .dtype = dtype_of(table, "embedding", "weight"),
                                .ids = ids.const_data_ptr<int32_t>(),
                                .table = table.const_data_ptr(),
                                .y = y.mutable_data_ptr()},
                               stream_of(table));
  }
  if (recording({weight.value})) {
    record("embedding", {weight.value}, {y},
           [ids, bucket = weight.grad](const Tensors& grads) -> Tensors {
             if (grads[0].defined() && bucket.defined()) add_embedding_grad(grads[0], ids, bucket);
             return {at::Tensor()};
           });
  }
  return y;
}

namespace reference {

at::Tensor embedding(const at::Tensor& ids, const at::Tensor& table) {
  return table.index_select(0, ids);
}

}  // namespace reference
}  // namespace dsv3::ops
