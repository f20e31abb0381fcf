// Self-tests of what training adds: the optimizer's pass, its norm, and the loss in parts of a
// vocabulary.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <cmath>

#include "cli/self_test.h"
#include "kernels/optimizer.h"
#include "ops/cross_entropy.h"
#include "ops/dispatch.h"
#include "ops/split_cross_entropy.h"

namespace dsv3::cli {
namespace {

SelfTestPairs test_adamw(SelfTestSetup& setup) {
  constexpr int64_t kSize = 1003, kDecayEnd = 700;
  constexpr double kRate = 0.01, kBeta1 = 0.9, kBeta2 = 0.95, kDecay = 0.1;
  const at::Tensor w = setup.normal({kSize}), g = setup.normal({kSize});
  const at::Tensor m = setup.normal({kSize}), v = setup.normal({kSize}).abs();
  const auto on_device = [&](const at::Tensor& x) { return setup.place(x).detach(); };
  const at::Tensor weights = on_device(w), gradients = on_device(g);
  const at::Tensor exp_avg = on_device(m), exp_avg_sq = on_device(v);
  const DType dtype = ops::dtype_of(weights, "adamw", "weights");
  const double c1 = 1 - kBeta1 * kBeta1, c2 = 1 - kBeta2 * kBeta2;
  kernels::adamw({.size = kSize,
                  .weight_dtype = dtype,
                  .gradient_dtype = dtype,
                  .moment_dtype = dtype,
                  .weights = weights.data_ptr(),
                  .master = nullptr,
                  .gradients = gradients.data_ptr(),
                  .exp_avg = exp_avg.data_ptr(),
                  .exp_avg_sq = exp_avg_sq.data_ptr(),
                  .learning_rate = static_cast<float>(kRate),
                  .beta1 = static_cast<float>(kBeta1),
                  .beta2 = static_cast<float>(kBeta2),
                  .eps = 1e-8f,
                  .weight_decay = static_cast<float>(kDecay),
                  .correction1 = static_cast<float>(c1),
                  .correction2 = static_cast<float>(c2),
                  .gradient_scale = nullptr,
                  .skip = nullptr,
                  .zero_gradients = false,
                  .decay_end = kDecayEnd},
                 ops::stream_of(weights));
  const at::Tensor new_m = m.mul(kBeta1).add(g.mul(1 - kBeta1));
  const at::Tensor new_v = v.mul(kBeta2).add(g.mul(g).mul(1 - kBeta2));
  const at::Tensor decayed = at::cat({w.narrow(0, 0, kDecayEnd).mul(1 - kRate * kDecay),
                                      w.narrow(0, kDecayEnd, kSize - kDecayEnd)});
  const at::Tensor new_w =
      decayed.sub(new_m.div(c1).div(new_v.div(c2).sqrt().add(1e-8)).mul(kRate));
  return {{weights, new_w}, {exp_avg, new_m}, {exp_avg_sq, new_v}};
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
