#include "bench/ops/case.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>

#include "ops/dispatch.h"
#include "ops/normal.h"

namespace dsv3::bench {
namespace {

constexpr Shape kShapes[] = {{.name = "v3",
                              .hidden = 7168,
                              .intermediate = 2048,
                              .heads = 128,
                              .q_rank = 1536,
                              .kv_rank = 512,
                              .vocab = 129280,
                              .experts = 256,
                              .choices = 8,
                              .groups = 8,
                              .topk_group = 4,
                              .scale = 2.5,
                              .parameters = 5718203392,
                              .gpu_tokens = 16384},
                             {.name = "lite12",
                              .hidden = 2048,
                              .intermediate = 1408,
                              .heads = 16,
                              .q_rank = 0,
                              .kv_rank = 512,
                              .vocab = 102400,
                              .experts = 64,
                              .choices = 6,
                              .groups = 1,
                              .topk_group = 1,
                              .scale = 2.446,
                              .parameters = 6933766144,
                              .gpu_tokens = 16384},
                             {.name = "small",
                              .hidden = 1024,
                              .intermediate = 704,
                              .heads = 8,
                              .q_rank = 0,
                              .kv_rank = 256,
                              .vocab = 32000,
                              .experts = 16,
                              .choices = 2,
                              .groups = 1,
                              .topk_group = 1,
                              .scale = 1.0,
                              .parameters = 520499200,
                              .gpu_tokens = 32768}};

at::ScalarType scalar_type(DType dtype) {
  return dtype == DType::kBF16 ? at::kBFloat16 : at::kFloat;
}

}  // namespace

std::span<const Shape> shapes() {
  return kShapes;
}

int64_t Problem::sequence() const {
  return tokens % shape.sequence == 0 ? shape.sequence : tokens;
}

int64_t Problem::num_sequences() const {
  return tokens / sequence();
}

at::Tensor Setup::normal(at::IntArrayRef sizes, double std) {
  return filled(empty(sizes), std);
}

at::Tensor Setup::normal32(at::IntArrayRef sizes, double std) {
  return filled(empty(sizes, at::kFloat), std);
}

at::Tensor Setup::filled(at::Tensor tensor, double std) {
  ops::fill_normal(tensor, 0, std, seed_, num_filled_++);
  return tensor;
}

at::Tensor Setup::empty(at::IntArrayRef sizes) {
  return empty(sizes, scalar_type(problem.dtype));
}

at::Tensor Setup::empty(at::IntArrayRef sizes, at::ScalarType type) {
  return keep(at::empty(sizes, at::TensorOptions(device).dtype(type)));
}

at::Tensor Setup::zeros(at::IntArrayRef sizes, at::ScalarType type) {
  return keep(at::zeros(sizes, at::TensorOptions(device).dtype(type)));
}

at::Tensor Setup::integers(at::IntArrayRef sizes, int64_t below) {
  return keep(at::randint(below, sizes, at::TensorOptions(device).dtype(at::kInt)));
}

at::Tensor Setup::keep(const at::Tensor& tensor) {
  kept_.push_back(tensor);
  return tensor;
}

at::Tensor Setup::distinct_experts() {
  const auto& shape = problem.shape;
  const at::Tensor draws = at::rand({problem.tokens, shape.experts}, at::TensorOptions(device));
  return keep(std::get<1>(at::topk(draws, shape.choices)).to(at::kInt));
}

at::Tensor Setup::positions() {
  return keep(at::arange(problem.tokens, at::TensorOptions(device).dtype(at::kInt))
                  .remainder(problem.sequence()));
}

Stream Setup::stream() const {
  return ops::stream_of(kept_.front());
}

std::vector<Benchmark> benchmarks() {
  std::vector<Benchmark> all;
  for (const auto family : {elementwise_benchmarks(), fused_benchmarks(), quantize_benchmarks(),
                            rotary_benchmarks(), loss_benchmarks(), routing_benchmarks(),
                            permutation_benchmarks(), optimizer_benchmarks()}) {
    all.insert(all.end(), family.begin(), family.end());
  }
  return all;
}

}  // namespace dsv3::bench
