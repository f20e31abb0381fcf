// The two ends of the model: the embedding table and the loss over the vocabulary.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones_like.h>

#include <algorithm>
#include <cmath>

#include "bench/ops/case.h"
#include "bench/ops/composed.h"
#include "kernels/elementwise.h"
#include "kernels/loss.h"
#include "ops/cross_entropy.h"
#include "ops/split_cross_entropy.h"

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
  return {[p, stream = s.stream()] { kernels::cross_entropy(p, stream); },
          composed_both([=] { return at::cross_entropy_loss(input.to(at::kFloat), targets); },
                        {input})};
}

/// The products take 6·T·V·D operations; on the CPU as many tokens as make a second of them.
int64_t head_tokens(const Problem& p) {
  constexpr int64_t kHostOperations = 200'000'000'000, kFewest = 16;
  const int64_t most = kHostOperations / (6 * p.shape.vocab * p.shape.hidden);
  return p.on_gpu ? p.tokens : std::min(p.tokens, std::max(most, kFewest));
}

/// The hidden states and the weight are read, their gradients written, the weight's in FP32 and
/// added to what its bucket holds. Not counted: chunks of logits, which a fused head would not
/// move. Bounded by its products on a GPU: the share of the copy's bandwidth is small.
Plan plan_head(const Problem& p) {
  const int64_t T = head_tokens(p), V = p.shape.vocab, D = p.shape.hidden;
  return {{{"T", T}, {"V", V}, {"D", D}},
          2 * T * D * p.element() + V * D * (p.element() + 2 * 4) + 4 * T,
          V * D * (p.element() + 4)};
}

Work make_head(Setup& s) {
  const int64_t T = head_tokens(s.problem), V = s.problem.shape.vocab, D = s.problem.shape.hidden;
  const at::Tensor hidden = s.normal({T, D}), labels = s.integers({T}, V);
  const double weight = 1.0 / static_cast<double>(T);
  const at::Tensor scale = s.keep(at::full({1}, weight, labels.options().dtype(at::kFloat))[0]);
  const at::Tensor matrix = s.normal({V, D}, 0.02), bucket = s.zeros({V, D}, at::kFloat);
  const at::Tensor ours = leaf(hidden), input = leaf(hidden), theirs = leaf(matrix);
  const ops::Weight head{leaf(matrix), bucket};
  const at::Tensor targets = s.keep(labels.to(at::kLong));
  // The weight's gradient goes to its bucket, not through the graph.
  return {composed_both(
              [=] { return ops::head_cross_entropy(ours, head, labels, scale).objective; }, {ours}),
          composed_both(
              [=] {
                const at::Tensor logits = at::linear(input, theirs);
                return at::cross_entropy_loss(logits.to(at::kFloat), targets);
              },
              {input, theirs})};
}

// Tensor parallelism over this many parts: the first one is timed.
constexpr int64_t kParts = 8;

int64_t part_size(const Problem& p) {
  return p.shape.vocab / kParts;
}

std::vector<std::pair<const char*, int64_t>> part_dims(const Problem& p) {
  return {{"T", p.tokens}, {"V", part_size(p)}, {"parts", kParts}};
}

Plan plan_statistics(const Problem& p) {
  return {part_dims(p), p.tokens * (part_size(p) * p.element() + 4 + 16)};
}

Plan plan_finish(const Problem& p) {
  return {part_dims(p), p.tokens * (2 * part_size(p) * p.element() + 4 + 16 * kParts + 8)};
}

struct PartInputs {
  at::Tensor logits, labels;  // [T, V / parts], [T] int32 in the part
  ops::VocabPart part;
};

PartInputs make_part(Setup& s) {
  const int64_t V = part_size(s.problem);
  return {s.normal({s.problem.tokens, V}),
          s.integers({s.problem.tokens}, V),
          {.begin = 0, .total = kParts * V}};
}

/// {largest, Σ e^(logit - largest), label's logit} of each token.
std::vector<at::Tensor> composed_statistics(const at::Tensor& logits, const at::Tensor& labels) {
  const at::Tensor largest = logits.amax(1, /*keepdim=*/true).to(at::kFloat);
  return {largest, (logits.to(at::kFloat) - largest).exp().sum(1, true), logits.gather(1, labels)};
}

Work make_statistics(Setup& s) {
  const PartInputs in = make_part(s);
  const at::Tensor targets = s.keep(in.labels.to(at::kLong).unsqueeze(1));
  return {[in] { ops::vocab_statistics(in.logits, in.labels, in.part); },
          composed_forward([in, targets] {
            composed_statistics(in.logits, targets);
            in.logits.argmax(1);
          })};
}

Work make_finish(Setup& s) {
  const PartInputs in = make_part(s);
  const at::Tensor targets = s.keep(in.labels.to(at::kLong).unsqueeze(1));
  const at::Tensor scale = s.keep(at::full({}, 1.0 / static_cast<double>(s.problem.tokens),
                                           in.labels.options().dtype(at::kFloat)));
  const at::Tensor statistics = s.keep(
      ops::vocab_statistics(in.logits, in.labels, in.part).unsqueeze(0).repeat({kParts, 1, 1}));
  const auto sums = composed_statistics(in.logits, targets);
  const at::Tensor largest = s.keep(sums[0]), sum = s.keep(sums[1] * kParts);
  const at::Tensor ones = s.keep(at::ones_like(targets, at::kFloat).neg());
  return {[in, statistics, scale] {
            ops::finish_cross_entropy_(in.logits, in.labels, in.part, statistics, scale,
                                       /*write_gradient=*/true);
          },
          composed_forward([=] {
            const at::Tensor label_logit = in.logits.gather(1, targets).to(at::kFloat);
            sum.log().add(largest).sub(label_logit);  // the losses
            const at::Tensor softmax = (in.logits.to(at::kFloat) - largest).exp_().div_(sum);
            in.logits.copy_(softmax.scatter_add_(1, targets, ones).mul_(scale));
          })};
}

constexpr Benchmark kBenchmarks[] = {
    {"embedding_forward", "rows of the table", plan_embedding_forward, make_embedding_forward},
    {"embedding_backward", "rows added into the table's FP32 gradient", plan_embedding_backward,
     make_embedding_backward},
    {"cross_entropy", "loss and gradient of the logits, in place", plan_cross_entropy,
     make_cross_entropy},
    {"head_cross_entropy",
     "product, loss and both gradients in chunks of tokens, 6 T V D operations", plan_head,
     make_head},
    {"cross_entropy_statistics", "an eighth of the vocabulary: maximum, sum and label's logit",
     plan_statistics, make_statistics},
    {"cross_entropy_finish", "the same part's gradient from all parts' statistics, in place",
     plan_finish, make_finish},
};

}  // namespace

std::span<const Benchmark> loss_benchmarks() {
  return kBenchmarks;
}

}  // namespace dsv3::bench
