#include "mla/latent_cache.h"

#include <ATen/ops/empty.h>

#include "base/error.h"

namespace dsv3 {

LatentCache::LatentCache(int64_t num_layers, int64_t num_sequences, int64_t capacity, int64_t width,
                         const at::TensorOptions& options)
    : capacity_(capacity), lengths_(static_cast<size_t>(num_layers), 0) {
  require(num_layers > 0 && num_sequences > 0 && capacity >= 0 && width > 0,
          "[latent cache] expected positive sizes, got {} layers × {} sequences × {} tokens × {}",
          num_layers, num_sequences, capacity, width);
  layers_.reserve(lengths_.size());
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    layers_.push_back(at::empty({num_sequences, capacity, width}, options));
  }
}

at::Tensor LatentCache::append(int64_t layer, const at::Tensor& latent) {
  require(layer >= 0 && layer < static_cast<int64_t>(layers_.size()),
          "[latent cache] layer {} of {}", layer, layers_.size());
  const auto index = static_cast<size_t>(layer);
  const at::Tensor& store = layers_[index];
  require(latent.dim() == 3 && latent.size(0) == store.size(0) && latent.size(2) == store.size(2),
          "[latent cache] latent: expected [{}, S, {}], got {} dims of {} elements", store.size(0),
          store.size(2), latent.dim(), latent.numel());
  const int64_t length = lengths_[index], added = latent.size(1);
  require(length + added <= capacity_,
          "[latent cache] full: {} tokens cached and {} more exceed its capacity of {}", length,
          added, capacity_);
  store.narrow(1, length, added).copy_(latent);
  lengths_[index] = length + added;
  return store.narrow(1, 0, length + added);
}

}  // namespace dsv3
