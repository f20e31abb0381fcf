#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace dsv3 {

/// What generation keeps of earlier tokens, per layer: the normalised latent c_kv and the ROTATED
/// shared rope key, [B, capacity, C + R]; all heads share it (the MQA form of arXiv:2405.04434
/// §2.1.2).
class LatentCache {
 public:
  LatentCache(int64_t num_layers, int64_t num_sequences, int64_t capacity, int64_t width,
              const at::TensorOptions& options);

  /// Appends `latent` [B, S, C + R] for `layer`; returns everything cached for it so far, [B,
  /// length, C + R].
  at::Tensor append(int64_t layer, const at::Tensor& latent);

  /// Tokens cached (the same for all layers between steps).
  int64_t length() const { return lengths_.empty() ? 0 : lengths_.back(); }
  int64_t capacity() const { return capacity_; }

 private:
  int64_t capacity_ = 0;
  std::vector<int64_t> lengths_;
  std::vector<at::Tensor> layers_;
};

}  // namespace dsv3
