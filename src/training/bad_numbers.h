#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "nn/parameter.h"

namespace dsv3 {

/// A parameter that holds NaN or infinity, in its weight or in its gradient.
struct BadTensor {
  std::string name;     // the released checkpoint's tensor that the first bad number belongs to
  int64_t layer = -1;   // as ParameterSpec::layer
  bool weight = false;  // the weight itself, else its gradient
  int64_t count = 0;    // bad numbers in the whole parameter
};

/// Keeps, on the device, the evidence of a step that was skipped: the gradients are cleared and the
/// next step runs before the host hears of it. The search reads gradients and weights on skipped
/// steps only; otherwise it costs one kernel that ends at once for each bucket and kind.
class BadNumbers {
 public:
  /// Keeps a reference to `parameters`, which must be allocated with gradients.
  explicit BadNumbers(const ParameterSet& parameters);

  /// Queues the search, between the decision and the pass that clears the gradients. skip: scalar
  /// int32 on the device (optim/adamw.h).
  void locate(const at::Tensor& skip, int64_t step);

  /// What was found at `step`, which was skipped, the likeliest cause first: weights in the order
  /// of the forward pass, then gradients in the order of the backward pass. Waits for the device.
  /// To be called before locate() of step + 2, whose evidence takes the same place.
  std::vector<BadTensor> take(int64_t step);

 private:
  at::Tensor slot(int64_t step) const;

  const ParameterSet& parameters_;
  std::vector<const Parameter*> order_;  // bucket by bucket as they lie
  std::vector<int64_t> begin_;           // [buckets + 1] of them before each bucket
  at::Tensor starts_;                    // [parameters] int64: offset of each in its bucket
  at::Tensor evidence_;  // [2 (step), 2 (gradient, weight), 2 (count, first), parameters] int64
};

/// The released checkpoint's name of element `index` of a parameter.
std::string piece_name(const ParameterSpec& spec, int64_t index);

}  // namespace dsv3
