#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "nn/parameter.h"

namespace dsv3 {

/// Numbers that go with every parameter and are laid out like the flat buckets: a moment of the
/// optimizer, the master weights, a moving average. Whoever owns them names them here, and saving
/// and loading need to know no more.
struct Companion {
  std::string prefix;             // of their tensors in a checkpoint ("exp_avg.model.norm.weight")
                                  // and of their files; lower case and underscores
  std::vector<at::Tensor> flats;  // one for each bucket, [bucket.numel()], any floating type and
                                  // device; undefined where a bucket has none
};

/// The part of `flat`, laid out like the parameter's bucket, that belongs to it: a view in its
/// shape. For trainable parameters.
at::Tensor part_of(const Parameter& parameter, const at::Tensor& flat);

}  // namespace dsv3
