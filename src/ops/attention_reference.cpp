#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>

#include <limits>

#include "ops/attention_cuda.h"

namespace dsv3::ops {

at::Tensor attention_mask(const AttentionOptions& options, int64_t sequence_length,
                          at::Device device) {
  const int64_t s = sequence_length;
  const at::Tensor later = at::ones({s, s}, at::TensorOptions(at::kBool).device(device)).triu(1);
  if (!options.documents.defined()) return later;
  const at::Tensor documents = options.documents.view({options.num_sequences, 1, s});
  return later.logical_or(documents.unsqueeze(3).ne(documents.unsqueeze(2)));
}

namespace reference {

at::Tensor attention(const AttentionInputs& inputs, const AttentionOptions& options) {
  const auto dtype = inputs.q.scalar_type();
  const auto by_head = [&](const at::Tensor& x) {
    const int64_t b = options.num_sequences;
    const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
    return x.to(wide).unflatten(0, {b, x.size(0) / b}).transpose(1, 2);
  };
  const at::Tensor q = by_head(inputs.q), k = by_head(inputs.k), v = by_head(inputs.v);
  const at::Tensor mask = attention_mask(options, q.size(2), q.device());
  const at::Tensor scores = at::matmul(q, k.transpose(2, 3))
                                .mul(options.scale)
                                .masked_fill(mask, -std::numeric_limits<double>::infinity());
  const at::Tensor out = at::matmul(at::softmax(scores, -1), v);
  return out.transpose(1, 2).flatten(0, 1).to(dtype).contiguous();
}

}  // namespace reference
}  // namespace dsv3::ops
