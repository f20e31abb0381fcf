#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/dtype.h"
#include "base/stream.h"

// The table of what `dsv3 bench op` times. A case is one operator in one direction at one shape;
// its file holds the bytes it should move, the call of our kernel and LibTorch's own way beside it.

namespace dsv3::bench {

/// Sizes of a model whose operators are timed; letters as in docs/notation.md.
struct Shape {
  const char* name;
  int64_t hidden;        // D
  int64_t intermediate;  // I of one routed expert
  int64_t heads;         // H
  int64_t q_rank;        // Q, 0 = none
  int64_t kv_rank;       // C
  int64_t vocab;         // V
  int64_t experts;       // E
  int64_t choices;       // K
  int64_t groups;        // n_group
  int64_t topk_group;
  double scale;                                // of the routing weights
  int64_t parameters;                          // that AdamW updates on a GPU
  int64_t gpu_tokens;                          // T of a micro-batch on a GPU
  int64_t nope = 128, rope = 64, value = 128;  // N, R, Vd
  int64_t sequence = 4096;                     // S
};

/// v3 (671B geometry; the parameters of its 3-layer slice), lite12 and small.
std::span<const Shape> shapes();

/// One shape with the choices of the command line.
struct Problem {
  Shape shape;
  int64_t tokens;  // T
  DType dtype;     // kF32 or kBF16: of activations and weights
  int64_t flat;    // elements of the optimizer's buckets
  bool on_gpu;

  int64_t element() const { return size_of(dtype); }
  int64_t sequence() const;       // S, the whole of T when 4096 does not divide it
  int64_t num_sequences() const;  // B
};

/// What a case is before anything is allocated.
struct Plan {
  std::vector<std::pair<const char*, int64_t>> dims;
  int64_t bytes;          // each input read once, each output written once
  int64_t allocated = 0;  // bytes that its tensors take when they are far more than `bytes`
};

/// Fresh random inputs on the device; owns every tensor that it hands out. `seed` is that of its
/// normal numbers; the others come from LibTorch's generator.
class Setup {
 public:
  Setup(const Problem& problem, at::Device device, uint64_t seed)
      : problem(problem), device(device), seed_(seed) {}

  const Problem problem;
  const at::Device device;

  at::Tensor normal(at::IntArrayRef sizes, double std = 1.0);    // in the problem's dtype
  at::Tensor normal32(at::IntArrayRef sizes, double std = 1.0);  // FP32
  at::Tensor empty(at::IntArrayRef sizes);                       // in the problem's dtype
  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type);
  at::Tensor zeros(at::IntArrayRef sizes, at::ScalarType type);
  at::Tensor integers(at::IntArrayRef sizes, int64_t below);  // int32 in [0, below)
  at::Tensor keep(const at::Tensor& tensor);                  // owns it from here on
  /// E experts of each of T tokens without repetition: [T, K] int32.
  at::Tensor distinct_experts();
  /// t mod S of every token: [T] int32.
  at::Tensor positions();
  Stream stream() const;  // the current one

 private:
  at::Tensor filled(at::Tensor tensor, double std);

  const uint64_t seed_;
  uint64_t num_filled_ = 0;
  std::vector<at::Tensor> kept_;
};

/// The two ways of one case on one set of inputs; valid while its Setup lives.
struct Work {
  std::function<void()> ours;
  std::function<void()> composed;
};

struct Benchmark {
  const char* name;  // "rms_norm_forward"
  const char* what;  // formula or sentence for --list
  Plan (*plan)(const Problem& problem);
  Work (*make)(Setup& setup);
};

// Each family's cases; benchmarks() holds all of them in this order.
std::span<const Benchmark> elementwise_benchmarks();
std::span<const Benchmark> fused_benchmarks();
std::span<const Benchmark> quantize_benchmarks();
std::span<const Benchmark> rotary_benchmarks();
std::span<const Benchmark> loss_benchmarks();
std::span<const Benchmark> routing_benchmarks();
std::span<const Benchmark> permutation_benchmarks();
std::span<const Benchmark> optimizer_benchmarks();
std::vector<Benchmark> benchmarks();

}  // namespace dsv3::bench
