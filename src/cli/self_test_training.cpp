// Self-tests of what training adds: the optimizer's pass, its norm, and the loss in parts of a
// vocabulary.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <cmath>

#include "cli/self_test.h"
#include "kernels/optimizer.h"
#include "ops/adamw.h"
#include "ops/cross_entropy.h"
#include "ops/dispatch.h"
#include "ops/split_cross_entropy.h"

namespace dsv3::cli {
namespace {

SelfTestPairs test_adamw(SelfTestSetup& setup) {
  constexpr int64_t kSize = 1003;
  const auto draw = [&] { return setup.normal({kSize}); };
  const ops::AdamWRange exact{draw(), {}, draw(), draw(), draw().abs(), draw()};
  const auto on_device = [&](const at::Tensor& x) { return setup.place(x).detach(); };
  const ops::AdamWRange range{on_device(exact.weights),    {},
                              on_device(exact.gradients),  on_device(exact.exp_avg),
                              on_device(exact.exp_avg_sq), on_device(exact.ema)};
  const ops::AdamWStep step{.learning_rate = 0.01,
                            .weight_decay = 0.1,
                            .decay_end = 700,
                            .ema_decay = 0.9,
                            .correction1 = 1 - 0.9 * 0.9,
                            .correction2 = 1 - 0.95 * 0.95};
  ops::adamw_(range, step);
  const ops::AdamWRange after = ops::reference::adamw(exact, step);
  return {{range.weights, after.weights},
          {range.exp_avg, after.exp_avg},
          {range.exp_avg_sq, after.exp_avg_sq},
          {range.ema, after.ema}};
}

SelfTestPairs test_gradient_norm(SelfTestSetup& setup) {
  const at::Tensor x = setup.normal({50021});
  const at::Tensor gradients = setup.place(x).detach();
  const auto doubles = gradients.options().dtype(at::kDouble);
  const at::Tensor partials = at::empty({kernels::kSumOfSquaresPartials}, doubles);
  const at::Tensor sum = at::empty({1}, doubles);
  kernels::sum_of_squares({.size = gradients.numel(),
                           .dtype = ops::dtype_of(gradients, "gradient_norm", "gradients"),
                           .x = gradients.data_ptr(),
                           .partials = partials.data_ptr<double>(),
                           .result = sum.data_ptr<double>()},
                          ops::stream_of(gradients));
  return {{sum, x.mul(x).sum().view({1})}};
}

SelfTestPairs test_split_cross_entropy(SelfTestSetup& setup) {
  constexpr int64_t kTokens = 19, kVocabulary = 1000, kWidth = 250;
  const at::Tensor logits = setup.normal({kTokens, kVocabulary});
  at::Tensor labels = setup.integers({kTokens}, kVocabulary);
  labels.data_ptr<int32_t>()[5] = ops::kIgnoreLabel;
  const at::Tensor expected_logits = logits.clone().requires_grad_(true);
  const at::Tensor expected = ops::reference::cross_entropy(expected_logits, labels);
  expected.sum().backward();
  const at::Tensor ids = setup.move(labels), scale = setup.move(at::tensor(1.0f));
  std::vector<at::Tensor> parts, statistics;
  for (int64_t begin = 0; begin < kVocabulary; begin += kWidth) {
    parts.push_back(setup.place(logits.narrow(1, begin, kWidth).contiguous()).detach());
    statistics.push_back(
        ops::vocab_statistics(parts.back(), ids, {.begin = begin, .total = kVocabulary}));
  }
  at::Tensor losses;
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t begin = static_cast<int64_t>(i) * kWidth;
    losses = ops::finish_cross_entropy_(parts[i], ids, {.begin = begin, .total = kVocabulary},
                                        at::stack(statistics), scale, true)
                 .losses;
  }
  return {{losses, expected}, {at::cat(parts, 1), expected_logits.grad()}};
}

}  // namespace

std::vector<SelfTest> training_self_tests() {
  return {{"adamw", test_adamw},
          {"gradient_norm", test_gradient_norm},
          {"split_cross_entropy", test_split_cross_entropy}};
}

}  // namespace dsv3::cli
