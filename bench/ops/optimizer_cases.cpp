// The passes over the flat buckets.
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cmath>

#include "bench/ops/case.h"
#include "bench/ops/composed.h"
#include "bench/ops/fp8.h"
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

/// A step over buckets that hold weights, gradients and both moments.
template <typename Tensors>
kernels::AdamW adamw_of(const Tensors& b) {
  const auto dtype_of = [](const at::Tensor& t) {
    return t.scalar_type() == at::kFloat ? DType::kF32 : DType::kBF16;
  };
  return {.size = b.weights.numel(),
          .weight_dtype = dtype_of(b.weights),
          .gradient_dtype = dtype_of(b.gradients),
          .moment_dtype = dtype_of(b.exp_avg),
          .weights = b.weights.mutable_data_ptr(),
          .master = nullptr,
          .gradients = b.gradients.mutable_data_ptr(),
          .exp_avg = b.exp_avg.mutable_data_ptr(),
          .exp_avg_sq = b.exp_avg_sq.mutable_data_ptr(),
          .learning_rate = static_cast<float>(kLearningRate),
          .beta1 = kBeta1,
          .beta2 = kBeta2,
          .eps = static_cast<float>(kEps),
          .weight_decay = static_cast<float>(kDecay),
          .correction1 = 1.0f,
          .correction2 = 1.0f,
          .gradient_scale = nullptr,
          .skip = nullptr,
          .zero_gradients = false};
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

  kernels::AdamW ours(const NormPass& norm) const {
    kernels::AdamW p = adamw_of(*this);
    p.gradient_scale = norm.finish.clip_factor;
    p.skip = norm.finish.not_finite;
    p.partials = moved.mutable_data_ptr<double>();
    return p;
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
  return {[p = b.ours(norm), stream = s.stream()] { kernels::adamw(p, stream); },
          composed_forward([=] {
            at::_foreach_mul_(b.gradient_list, factor);
            composed_adamw(b);
          })};
}

Work make_step(Setup& s) {
  const Buckets b(s);
  const NormPass norm(s, b.gradients);
  return {[norm, p = b.ours(norm), stream = s.stream()] {
            norm.run(stream);
            kernels::adamw(p, stream);
          },
          composed_forward([b] {
            at::_foreach_mul_(b.gradient_list, composed_clip_factor(b.gradient_list));
            composed_adamw(b);
          })};
}

// The variants of AdamW run over this many elements at most: what one of many ranks holds.
constexpr int64_t kVariantElements = int64_t{1} << 29;

/// Whole rows of the hidden size.
int64_t variant_rows(const Problem& p) {
  return std::max<int64_t>(1, std::min(p.flat, kVariantElements) / p.shape.hidden);
}

int64_t variant_elements(const Problem& p) {
  return variant_rows(p) * p.shape.hidden;
}

/// BF16 weights with an FP32 master; gradients and moments in FP32. Reads master, gradient and
/// moments, writes master, moments and weights.
Plan plan_master(const Problem& p) {
  const int64_t n = variant_elements(p);
  return {{{"n", n}}, n * (4 * 4 + 3 * 4 + 2)};
}

/// The same and the weights in FP8 128×128 blocks.
Plan plan_fp8(const Problem& p) {
  const int64_t n = variant_elements(p), D = p.shape.hidden;
  const int64_t blocks = (variant_rows(p) + 127) / 128 * ((D + 127) / 128);
  return {{{"n", n}, {"D", D}}, plan_master(p).bytes + n + 4 * blocks};
}

/// All in BF16, rounded at random, and a BF16 running mean.
Plan plan_stochastic(const Problem& p) {
  const int64_t n = variant_elements(p);
  return {{{"n", n}}, n * 2 * 9};
}

struct MasterBuckets {
  at::Tensor weights, master, gradients, exp_avg, exp_avg_sq;  // [n]
  at::Tensor step;

  explicit MasterBuckets(Setup& s, int64_t n)
      : weights(s.empty({n}, at::kBFloat16)),
        master(s.normal32({n}, 0.02)),
        gradients(s.normal32({n}, 1e-4)),
        exp_avg(s.normal32({n}, 1e-4)),
        exp_avg_sq(s.normal32({n}, 1e-4)),
        step(s.keep(at::full({}, 100.0, master.options()))) {
    exp_avg_sq.square_();
    weights.copy_(master);
  }

  kernels::AdamW ours() const {
    kernels::AdamW p = adamw_of(*this);
    p.master = master.mutable_data_ptr<float>();
    return p;
  }
  void composed() const {
    at::_fused_adamw_({master}, {gradients}, {exp_avg}, {exp_avg_sq}, {}, {step}, kLearningRate,
                      kBeta1, kBeta2, kDecay, kEps, /*amsgrad=*/false, /*maximize=*/false);
    weights.copy_(master);
  }
};

Work make_master(Setup& s) {
  const MasterBuckets b(s, variant_elements(s.problem));
  return {[p = b.ours(), stream = s.stream()] { kernels::adamw(p, stream); },
          composed_forward([b] { b.composed(); })};
}

Work make_fp8(Setup& s) {
  const int64_t rows = variant_rows(s.problem), D = s.problem.shape.hidden;
  const MasterBuckets b(s, rows * D);
  const int64_t across = (D + 127) / 128, down = (rows + 127) / 128;
  const kernels::AdamWFp8 p{.update = b.ours(),
                            .rows = rows,
                            .columns = D,
                            .codes = s.empty({rows, D}, at::kByte).mutable_data_ptr<uint8_t>(),
                            .scales = s.empty({down, across}, at::kFloat).mutable_data_ptr<float>(),
                            .scale_stride = across,
                            .rule = {}};
  return {[p, stream = s.stream()] { kernels::adamw_fp8(p, stream); }, composed_forward([=] {
            b.composed();
            const at::Tensor matrix = b.master.view({rows, D});
            composed_blocks(at::constant_pad_nd(matrix, {0, 0, 0, 128 * down - rows}));
          })};
}

struct HalfBuckets {
  at::Tensor weights, gradients, exp_avg, exp_avg_sq, ema;  // [n] BF16
  at::Tensor step;

  HalfBuckets(Setup& s, int64_t n)
      : weights(bf16(s, n, 0.02)),
        gradients(bf16(s, n, 1e-4)),
        exp_avg(bf16(s, n, 1e-4)),
        exp_avg_sq(bf16(s, n, 1e-4).square_()),
        ema(bf16(s, n, 0.02)),
        step(s.keep(at::full({}, 100.0, weights.options().dtype(at::kFloat)))) {}

  static at::Tensor bf16(Setup& s, int64_t n, double std) {
    return s.keep(s.normal32({n}, std).to(at::kBFloat16));
  }
  kernels::AdamW ours() const {
    kernels::AdamW p = adamw_of(*this);
    p.ema = ema.mutable_data_ptr();
    p.ema_dtype = DType::kBF16;
    p.ema_decay = 0.999;
    p.stochastic_rounding = true;
    p.seed = 1;
    p.step = 1;
    return p;
  }
  /// LibTorch's fused step rounds to nearest: it has no random rounding.
  void composed() const {
    at::_fused_adamw_({weights}, {gradients}, {exp_avg}, {exp_avg_sq}, {}, {step}, kLearningRate,
                      kBeta1, kBeta2, kDecay, kEps, /*amsgrad=*/false, /*maximize=*/false);
    ema.lerp_(weights, 1e-3);
  }
};

Work make_stochastic(Setup& s) {
  const HalfBuckets b(s, variant_elements(s.problem));
  return {[p = b.ours(), stream = s.stream()] { kernels::adamw(p, stream); },
          composed_forward([b] { b.composed(); })};
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
    {"adamw_master", "BF16 weights, FP32 master, gradients and moments", plan_master, make_master},
    {"adamw_fp8", "the same, and the weights in FP8 blocks in the same pass", plan_fp8, make_fp8},
    {"adamw_stochastic", "all in BF16 rounded at random, and a running mean", plan_stochastic,
     make_stochastic},
    {"normal_fill", "N(0, 1) by counter, for initialisation", plan_normal, make_normal},
};

}  // namespace

std::span<const Benchmark> optimizer_benchmarks() {
  return kBenchmarks;
}

}  // namespace dsv3::bench
