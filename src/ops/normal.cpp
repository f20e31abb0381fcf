#include "ops/normal.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "base/error.h"
#include "kernels/optimizer.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"

namespace dsv3::ops {

void fill_normal(at::Tensor& out, double mean, double std, uint64_t seed, uint64_t stream) {
  require(out.is_contiguous(), "[fill_normal] out must be contiguous");
  const NoRecord guard;
  if (!has_kernel(out)) {
    at::Tensor narrow = at::empty(out.sizes(), out.options().dtype(at::kFloat));
    fill_normal(narrow, mean, std, seed, stream);
    out.copy_(narrow);
    return;
  }
  kernels::normal_fill({.rows = 1,
                        .columns = out.numel(),
                        .first = 0,
                        .pitch = 0,
                        .stride = out.numel(),
                        .seed = seed,
                        .stream = stream,
                        .mean = static_cast<float>(mean),
                        .std = static_cast<float>(std),
                        .dtype = dtype_of(out, "fill_normal", "out"),
                        .y = out.data_ptr()},
                       stream_of(out));
}

}  // namespace dsv3::ops
