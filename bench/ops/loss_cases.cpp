// The two ends of the model: the embedding table and the loss over the vocabulary.
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/full.h>

#include <cmath>

#include "bench/ops/case.h"
#include "bench/ops/composed.h"
#include "kernels/elementwise.h"
#include "kernels/loss.h"

namespace dsv3::bench {
namespace {

std::vector<std::pair<const char*, int64_t>> table_dims(const Problem& p) {
  return {{"T", p.tokens}, {"V", p.shape.vocab}, {"D", p.shape.hidden}};
}

Plan plan_embedding_forward(const Problem& p) {
  const int64_t D = p.shape.hidden;
  return {table_dims(p), 2 * p.tokens * D * p.element() + 4 * p.tokens,
          p.shape.vocab * D * p.element()};
}

/// Rows of the table that T uniform ids hit, on average.
int64_t rows_hit(const Problem& p) {
  const auto V = static_cast<double>(p.shape.vocab);
  return std::llround(V * -std::expm1(static_cast<double>(p.tokens) * std::log1p(-1.0 / V)));
}

Plan plan_embedding_backward(const Problem& p) {
  const int64_t D = p.shape.hidden;
  return {table_dims(p), p.tokens * D * p.element() + 4 * p.tokens + 2 * 4 * rows_hit(p) * D,
          p.shape.vocab * D * (4 + p.element())};
}

Work make_embedding_forward(Setup& s) {
  const int64_t T = s.problem.tokens, V = s.problem.shape.vocab, D = s.problem.shape.hidden;
  const at::Tensor table = s.normal({V, D}), ids = s.integers({T}, V);
  const kernels::EmbeddingForward p{.num_tokens = T,
                                    .vocab = V,
                                    .hidden = D,
                                    .dtype = s.problem.dtype,
                                    .ids = ids.const_data_ptr<int32_t>(),
                                    .table = table.const_data_ptr(),
                                    .y = s.empty({T, D}).mutable_data_ptr()};
  return {[p, stream = s.stream()] { kernels::embedding_forward(p, stream); },
          composed_forward([=] { at::embedding(table, ids); })};
}

Work make_embedding_backward(Setup& s) {
  const int64_t T = s.problem.tokens, V = s.problem.shape.vocab, D = s.problem.shape.hidden;
  const at::Tensor ids = s.integers({T}, V), dy = s.normal({T, D});
  const int64_t scratch = kernels::embedding_backward_scratch(T, V, D, /*cuda=*/s.device.is_cuda());
  const kernels::EmbeddingBackward p{.num_tokens = T,
                                     .vocab = V,
                                     .hidden = D,
                                     .dtype = s.problem.dtype,
                                     .dtable_dtype = DType::kF32,
                                     .ids = ids.const_data_ptr<int32_t>(),
                                     .dy = dy.const_data_ptr(),
                                     .dtable = s.zeros({V, D}, at::kFloat).mutable_data_ptr(),
                                     .scratch = s.empty({scratch}, at::kByte).mutable_data_ptr()};
  const at::Tensor table = leaf(s.empty({V, D}));
  return {
      [p, stream = s.stream()] { kernels::embedding_backward(p, stream); },
      composed_backward([=]() -> std::vector<at::Tensor> { return {at::embedding(table, ids)}; },
                        {table}, {dy})};
}

Plan plan_cross_entropy(const Problem& p) {
  return {{{"T", p.tokens}, {"V", p.shape.vocab}},
          2 * p.tokens * p.shape.vocab * p.element() + 3 * 4 * p.tokens};
}

Work make_cross_entropy(Setup& s) {
  const int64_t T = s.problem.tokens, V = s.problem.shape.vocab;
  // In one direction ours writes over the logits: LibTorch's way starts from the same memory, so
  // that one buffer serves both.
  const at::Tensor logits = s.normal({T, V}), labels = s.integers({T}, V);
  const double weight = 1.0 / static_cast<double>(T);
  const at::Tensor scale = s.keep(at::full({1}, weight, labels.options().dtype(at::kFloat)));
  const kernels::CrossEntropy p{.num_tokens = T,
                                .vocab = V,
                                .dtype = s.problem.dtype,
                                .logits = logits.mutable_data_ptr(),
                                .labels = labels.const_data_ptr<int32_t>(),
                                .scale = scale.const_data_ptr<float>(),
                                .write_gradient = true,
                                .losses = s.empty({T}, at::kFloat).mutable_data_ptr<float>(),
                                .correct = s.empty({T}, at::kInt).mutable_data_ptr<int32_t>()};
  const at::Tensor input = leaf(logits), targets = s.keep(labels.to(at::kLong));
  return {
      [p, stream = s.stream()] { kernels::cross_entropy(p, stream); },
      composed_both([=] { return at::cross_entropy_loss(input.to(at::kFloat), targets); }, input)};
}

constexpr Benchmark kBenchmarks[] = {
    {"embedding_forward", "rows of the table", plan_embedding_forward, make_embedding_forward},
    {"embedding_backward", "rows added into the table's FP32 gradient", plan_embedding_backward,
     make_embedding_backward},
    {"cross_entropy", "loss and gradient of the logits, in place", plan_cross_entropy,
     make_cross_entropy},
};

}  // namespace

std::span<const Benchmark> loss_benchmarks() {
  return kBenchmarks;
}

}  // namespace dsv3::bench
