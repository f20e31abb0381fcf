#pragma once

#include <ATen/core/Tensor.h>

#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/dtype.h"
#include "ops/weight.h"

namespace dsv3 {

/// What one tensor of the released checkpoint is within a parameter that may hold several (fused
/// projections, all experts of a layer): rows [row_begin, row_end) of slice `index`.
struct CheckpointPiece {
  std::string name;       // Hugging Face tensor name, GLOBAL layer and expert ids
  int64_t index = -1;     // into dim 0 of a 3-D parameter (the expert); -1 = 2-D or 1-D parameter
  int64_t row_begin = 0;  // within the (sliced) parameter's first dim
  int64_t row_end = 0;
  int tp_dim = -1;  // dim of the PIECE that tensor parallelism splits; -1 = replicated
};

enum class Init : uint8_t { kNormal, kOnes, kZeros };

/// The ONE declaration of a parameter (DESIGN §3.1): initialisation, buckets, checkpoints, import
/// and export, counts and the memory model all derive from it.
struct ParameterSpec {
  std::string name;                     // ours, unique: "layers.3.moe.experts.gate_up"
  std::vector<int64_t> shape;           // global
  std::vector<CheckpointPiece> pieces;  // cover the parameter exactly once
  int64_t layer = -1;  // -1 embedding, 0 … num_layers-1, num_layers head and final norm, then MTP
  bool expert = false;      // dim 0 is the expert: split over expert parallelism
  bool float32 = false;     // held in FP32 whatever the model's dtype (router)
  bool vocabulary = false;  // embedding or head: its rows are the vocabulary's
  bool decay = true;        // weight-decay class
  bool trainable =
      true;  // false: a buffer (routing bias): no gradient, clipping, decay; saved always
  Init init = Init::kNormal;
  double init_std = 0.006;
  double active_fraction = 1.0;  // share of it that one token uses (K/E for routed experts)

  int64_t numel() const;
};

/// A declared parameter with its storage: views into the flat buckets once ParameterSet::allocate
/// ran.
struct Parameter {
  ParameterSpec spec;
  ops::Weight weight;   // value (leaf) and gradient
  int64_t bucket = -1;  // index into ParameterSet::buckets(); -1 for buffers
  int64_t offset = 0;   // elements from the bucket's start

  const at::Tensor& value() const { return weight.value; }
  /// The view of `value` (or of another tensor laid out like it) that one checkpoint tensor covers.
  at::Tensor piece_view(const CheckpointPiece& piece, const at::Tensor& whole) const;
};

/// Parameters of one dtype and reduction group, end to end in one buffer: [decayed | not decayed].
struct Bucket {
  bool expert = false;    // reduced over the expert-data-parallel group, else over data parallel
  at::Tensor values;      // [numel] model dtype or FP32
  at::Tensor grads;       // [numel] gradient dtype; undefined when frozen for inference
  int64_t decay_end = 0;  // elements [0, decay_end) decay, the rest do not
  int64_t numel() const { return values.numel(); }
};

struct AllocateOptions {
  DType dtype = DType::kBF16;  // of parameters without `float32`
  DType gradient_dtype = DType::kF32;
  bool gradients = true;  // false: inference and evaluation
  bool cuda = false;
};

/// All parameters of a model (or of the part that lives on this rank), in declaration order.
class ParameterSet {
 public:
  /// Declares a parameter; the reference stays valid. Throws std::logic_error on a repeated name or
  /// pieces that do not cover it.
  Parameter& declare(ParameterSpec spec);

  /// Allocates buckets and points every parameter into them. Values are uninitialised, gradients
  /// zero.
  void allocate(const AllocateOptions& options);

  /// Fills every parameter from its declaration. Each normal number depends on (seed, name, global
  /// index) only.
  void initialize(uint64_t seed);

  void zero_gradients();

  std::deque<Parameter>& parameters() { return parameters_; }
  const std::deque<Parameter>& parameters() const { return parameters_; }
  std::vector<Bucket>& buckets() { return buckets_; }
  const std::vector<Bucket>& buckets() const { return buckets_; }
  const Parameter* find(const std::string& name) const;

  int64_t total_parameters() const;  // trainable, shared ones once, MTP included
  double active_parameters() const;  // weighted by active_fraction

 private:
  void bind(Parameter& parameter);

  std::deque<Parameter> parameters_;
  std::unordered_map<std::string, size_t> names_;
  std::vector<Bucket> buckets_;
};

}  // namespace dsv3
