#include "nn/parameter.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <numeric>
#include <unordered_set>

#include "base/error.h"
#include "nn/companion.h"
#include "ops/autograd.h"
#include "ops/normal.h"

namespace dsv3 {
namespace {

// Parameters start on a multiple of this many elements, so that vector accesses stay aligned in any
// dtype.
constexpr int64_t kAlignment = 128;

int64_t aligned(int64_t count) {
  return (count + kAlignment - 1) / kAlignment * kAlignment;
}

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return at::kFloat;
    case DType::kBF16:
      return at::kBFloat16;
    case DType::kF64:
      return at::kDouble;
    default:
      invalid("parameters are fp32 or bf16 (fp64 in tests), not {}", name_of(dtype));
  }
}

void check_pieces(const ParameterSpec& spec) {
  const bool stacked = spec.shape.size() == 3;
  int64_t covered = 0;
  std::unordered_set<std::string> names;
  for (const auto& piece : spec.pieces) {
    DSV3_CHECK(names.insert(piece.name).second, "{}: two pieces named {}", spec.name, piece.name);
    DSV3_CHECK((piece.index >= 0) == stacked, "{}: piece {} has index {}", spec.name, piece.name,
               piece.index);
    const int64_t rows = stacked ? spec.shape[1] : spec.shape[0];
    DSV3_CHECK(piece.row_begin >= 0 && piece.row_begin < piece.row_end && piece.row_end <= rows,
               "{}: piece {} covers rows [{}, {}) of {}", spec.name, piece.name, piece.row_begin,
               piece.row_end, rows);
    covered += piece.row_end - piece.row_begin;
  }
  const int64_t rows = stacked ? spec.shape[0] * spec.shape[1] : spec.shape[0];
  DSV3_CHECK(covered == rows, "{}: pieces cover {} rows of {}", spec.name, covered, rows);
}

/// Splits a name into a stream of random numbers of its own (FNV-1a, 64 bits).
uint64_t stream_of(const std::string& name) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const char c : name) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3ull;
  return hash;
}

}  // namespace

int64_t ParameterSpec::numel() const {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

at::Tensor Parameter::piece_view(const CheckpointPiece& piece, const at::Tensor& whole) const {
  const at::Tensor slice = piece.index >= 0 ? whole.select(0, piece.index) : whole;
  return slice.narrow(0, piece.row_begin, piece.row_end - piece.row_begin);
}

at::Tensor part_of(const Parameter& parameter, const at::Tensor& flat) {
  return flat.narrow(0, parameter.offset, parameter.spec.numel()).view(parameter.spec.shape);
}

Parameter& ParameterSet::declare(ParameterSpec spec) {
  DSV3_CHECK(find(spec.name) == nullptr, "parameter {} is declared twice", spec.name);
  check_pieces(spec);
  names_.emplace(spec.name, parameters_.size());
  parameters_.push_back({.spec = std::move(spec), .weight = {}});
  return parameters_.back();
}

void ParameterSet::allocate(const AllocateOptions& options) {
  const ops::NoRecord guard;
  const auto device = at::Device(options.cuda ? at::kCUDA : at::kCPU);
  buckets_.clear();
  // [float32 or model dtype][expert or not]: one bucket for each combination that occurs.
  for (const bool float32 : {false, true}) {
    for (const bool expert : {false, true}) {
      std::vector<Parameter*> members;
      for (const bool decay : {true, false}) {
        for (auto& parameter : parameters_) {
          const auto& spec = parameter.spec;
          if (spec.trainable && spec.float32 == float32 && spec.expert == expert &&
              spec.decay == decay) {
            members.push_back(&parameter);
          }
        }
      }
      if (members.empty()) continue;
      Bucket bucket{.expert = expert, .values = {}, .grads = {}};
      int64_t size = 0;
      for (auto* parameter : members) {
        parameter->bucket = static_cast<int64_t>(buckets_.size());
        parameter->offset = size;
        size += aligned(parameter->spec.numel());
        if (parameter->spec.decay) bucket.decay_end = size;
      }
      const auto value_type =
          float32 && options.dtype != DType::kF64 ? at::kFloat : scalar_type(options.dtype);
      // The gaps between parameters stay zero, so that whole-bucket passes see harmless numbers.
      bucket.values = at::zeros({size}, at::TensorOptions(value_type).device(device));
      if (options.gradients) {
        const auto grad_type =
            value_type == at::kBFloat16 ? scalar_type(options.gradient_dtype) : value_type;
        bucket.grads = at::zeros({size}, at::TensorOptions(grad_type).device(device));
      }
      buckets_.push_back(std::move(bucket));
      for (auto* parameter : members) bind(*parameter);
    }
  }
  // Buffers are FP32 whatever the model's dtype (FP64 in tests).
  const auto buffer_type = options.dtype == DType::kF64 ? at::kDouble : at::kFloat;
  for (auto& parameter : parameters_) {
    if (parameter.spec.trainable) continue;
    parameter.weight.value =
        at::zeros(parameter.spec.shape, at::TensorOptions(buffer_type).device(device));
  }
}

void ParameterSet::bind(Parameter& parameter) {
  const auto& bucket = buckets_[static_cast<size_t>(parameter.bucket)];
  parameter.weight.value = part_of(parameter, bucket.values);
  if (bucket.grads.defined()) {
    parameter.weight.grad = part_of(parameter, bucket.grads);
    parameter.weight.value.requires_grad_(true);
  }
}

void ParameterSet::initialize(uint64_t seed) {
  const ops::NoRecord guard;
  for (auto& parameter : parameters_) {
    const auto& spec = parameter.spec;
    at::Tensor value = parameter.weight.value.detach();
    switch (spec.init) {
      case Init::kZeros:
        value.zero_();
        break;
      case Init::kOnes:
        value.fill_(1);
        break;
      case Init::kNormal:
        ops::fill_normal(value, 0.0, spec.init_std, seed, stream_of(spec.name));
        break;
    }
  }
}

void ParameterSet::zero_gradients() {
  for (auto& bucket : buckets_) {
    if (bucket.grads.defined()) bucket.grads.zero_();
  }
}

const Parameter* ParameterSet::find(const std::string& name) const {
  const auto found = names_.find(name);
  return found == names_.end() ? nullptr : &parameters_[found->second];
}

int64_t ParameterSet::total_parameters() const {
  int64_t total = 0;
  for (const auto& parameter : parameters_) {
    if (parameter.spec.trainable) total += parameter.spec.numel();
  }
  return total;
}

double ParameterSet::active_parameters() const {
  double active = 0;
  for (const auto& parameter : parameters_) {
    if (parameter.spec.trainable) {
      active += static_cast<double>(parameter.spec.numel()) * parameter.spec.active_fraction;
    }
  }
  return active;
}

}  // namespace dsv3
