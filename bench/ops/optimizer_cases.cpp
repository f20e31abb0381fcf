// The passes over the flat buckets.
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>

#include <cmath>

#include "bench/ops/case.h"
#include "bench/ops/composed.h"
#include "kernels/optimizer.h"

namespace dsv3::bench {
namespace {

constexpr double kLearningRate = 1e-4, kBeta1 = 0.9, kBeta2 = 0.95, kEps = 1e-8, kDecay = 0.1;
constexpr float kMaxNorm = 1.0f;
// LibTorch gets the buckets as a list of tensors, as a model's parameters are.
constexpr int64_t kListElements = int64_t{1} << 27;

std::vector<std::pair<const char*, int64_t>> flat_dims(const Problem& p) {
  return {{"n", p.flat}};
}

Plan plan_norm(const Problem& p) {
  return {flat_dims(p), p.flat * p.element()};
}

/// Reads weight, gradient and both moments, writes weight and moments.
Plan plan_adamw(const Problem& p) {
  return {flat_dims(p), 7 * p.flat * p.element()};
}

Plan plan_step(const Problem& p) {
  return {flat_dims(p), 8 * p.flat * p.element()};
}

/// The norm of all gradients in two kernels.
struct NormPass {
  kernels::SumOfSquares sum;
  kernels::FinishNorm finish;

  NormPass(Setup& s, const at::Tensor& gradients)
      : sum{.size = gradients.numel(),
            .dtype = s.problem.dtype,
            .x = gradients.const_data_ptr(),
            .partials =
                s.empty({kernels::kSumOfSquaresPartials}, at::kDouble).mutable_data_ptr<double>(),
            .result = s.empty({1}, at::kDouble).mutable_data_ptr<double>()},
        finish{.count = 1,
               .sums = sum.result,
               .max_norm = kMaxNorm,
               .norm = s.empty({1}, at::kFloat).mutable_data_ptr<float>(),
               .clip_factor = s.empty({1}, at::kFloat).mutable_data_ptr<float>(),
               .not_finite = s.empty({1}, at::kInt).mutable_data_ptr<int32_t>()} {}

  void run(Stream stream) const {
    kernels::sum_of_squares(sum, stream);
    kernels::finish_norm(finish, stream);
  }
};

/// Gradients of norm 1/2, which no clipping changes: repeated runs keep them as they are.
double gradient_std(const Setup& s) {
  return 0.5 / std::sqrt(static_cast<double>(s.problem.flat));
}

/// Weights, gradients and moments of one flat bucket, and LibTorch's lists over the same memory.
struct Buckets {
  at::Tensor weights, gradients, exp_avg, exp_avg_sq;  // [n]
  at::Tensor moved;                                    // [parts, 2] FP64, how far ours moves
  std::vector<at::Tensor> weight_list, gradient_list, exp_avg_list, exp_avg_sq_list, steps;

  explicit Buckets(Setup& s)
      : weights(s.normal({s.problem.flat}, 0.02)),
        gradients(s.normal({s.problem.flat}, gradient_std(s))),
        exp_avg(s.normal({s.problem.flat}, gradient_std(s))),
        exp_avg_sq(s.normal({s.problem.flat}, gradient_std(s))),
        moved(s.zeros({kernels::adamw_partials(s.problem.flat), 2}, at::kDouble)),
        weight_list(weights.split(kListElements)),
        gradient_list(gradients.split(kListElements)),
        exp_avg_list(exp_avg.split(kListElements)),
        exp_avg_sq_list(exp_avg_sq.square_().split(kListElements)) {
    for (size_t i = 0; i < weight_list.size(); ++i)
      steps.push_back(s.keep(at::full({}, 100.0, weights.options().dtype(at::kFloat))));
  }

  kernels::AdamW ours(const NormPass& norm, DType dtype) const {
    return {.size = weights.numel(),
            .weight_dtype = dtype,
            .gradient_dtype = dtype,
            .moment_dtype = dtype,
            .weights = weights.mutable_data_ptr(),
            .master = nullptr,
            .gradients = gradients.mutable_data_ptr(),
            .exp_avg = exp_avg.mutable_data_ptr(),
            .exp_avg_sq = exp_avg_sq.mutable_data_ptr(),
            .learning_rate = static_cast<float>(kLearningRate),
            .beta1 = static_cast<float>(kBeta1),
            .beta2 = static_cast<float>(kBeta2),
            .eps = static_cast<float>(kEps),
            .weight_decay = static_cast<float>(kDecay),
            .correction1 = 1.0f,
            .correction2 = 1.0f,
            .gradient_scale = norm.finish.clip_factor,
            .skip = norm.finish.not_finite,
            .zero_gradients = false,
            .partials = moved.mutable_data_ptr<double>()};
  }
};

/// torch.nn.utils.clip_grad_norm_'s factor, on the device.
at::Tensor composed_clip_factor(const std::vector<at::Tensor>& gradients) {
  const at::Tensor norm = at::linalg_vector_norm(at::stack(at::_foreach_norm(gradients)));
  return norm.add(1e-6).reciprocal().mul(kMaxNorm).clamp_max(1.0);
}

void composed_adamw(const Buckets& b) {
  at::_fused_adamw_(b.weight_list, b.gradient_list, b.exp_avg_list, b.exp_avg_sq_list, {}, b.steps,
                    kLearningRate, kBeta1, kBeta2, kDecay, kEps, /*amsgrad=*/false,
                    /*maximize=*/false);
}

Work make_norm(Setup& s) {
  const at::Tensor gradients = s.normal({s.problem.flat}, gradient_std(s));
  const auto list = gradients.split(kListElements);
  const NormPass norm(s, gradients);
  return {[norm, stream = s.stream()] { norm.run(stream); },
          composed_forward([list] { composed_clip_factor(list); })};
}

Work make_adamw(Setup& s) {
  const Buckets b(s);
  const NormPass norm(s, b.gradients);
  norm.run(s.stream());
  const at::Tensor factor = s.keep(composed_clip_factor(b.gradient_list));
  return {[p = b.ours(norm, s.problem.dtype), stream = s.stream()] { kernels::adamw(p, stream); },
          composed_forward([=] {
            at::_foreach_mul_(b.gradient_list, factor);
            composed_adamw(b);
          })};
}

Work make_step(Setup& s) {
  const Buckets b(s);
  const NormPass norm(s, b.gradients);
  return {[norm, p = b.ours(norm, s.problem.dtype), stream = s.stream()] {
            norm.run(stream);
            kernels::adamw(p, stream);
          },
          composed_forward([b] {
            at::_foreach_mul_(b.gradient_list, composed_clip_factor(b.gradient_list));
            composed_adamw(b);
          })};
}

Plan plan_normal(const Problem& p) {
  const int64_t n = p.tokens * p.shape.hidden;
  return {{{"n", n}}, n * p.element()};
}

Work make_normal(Setup& s) {
  const int64_t T = s.problem.tokens, D = s.problem.shape.hidden;
  at::Tensor y = s.empty({T, D});
  const kernels::NormalFill p{.rows = T,
                              .columns = D,
                              .first = 0,
                              .pitch = D,
                              .stride = D,
                              .seed = 1,
                              .stream = 1,
                              .mean = 0.0f,
                              .std = 1.0f,
                              .dtype = s.problem.dtype,
                              .y = y.mutable_data_ptr()};
  return {[p, stream = s.stream()] { kernels::normal_fill(p, stream); },
          composed_forward([y] { y.normal_(); })};
}

constexpr Benchmark kBenchmarks[] = {
    {"gradient_norm", "norm of all gradients and the clip factor", plan_norm, make_norm},
    {"adamw", "clip, moments, decay and weights in one pass, all of one dtype", plan_adamw,
     make_adamw},
    {"optimizer_step", "norm, clip and AdamW", plan_step, make_step},
    {"normal_fill", "N(0, 1) by counter, for initialisation", plan_normal, make_normal},
};

}  // namespace

std::span<const Benchmark> optimizer_benchmarks() {
  return kBenchmarks;
}

}  // namespace dsv3::bench
