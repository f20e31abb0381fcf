#include "ops/bucket_leaf.h"

#include "ops/autograd.h"

namespace dsv3::ops {

at::Tensor bucket_leaf(const Weight& weight) {
  at::Tensor alias;
  {
    const NoRecord guard;
    alias = weight.value.detach();
  }
  if (!weight.grad.defined() || !recording({weight.value})) return alias;
  record("bucket_leaf", {weight.value}, {alias},
         [bucket = weight.grad](const Tensors& grads) -> Tensors {
           if (grads[0].defined()) bucket.add_(grads[0]);
           return {at::Tensor()};
         });
  return alias;
}

}  // namespace dsv3::ops
