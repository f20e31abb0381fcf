#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "config/config.h"
#include "nn/parameter.h"

namespace dsv3::testing {

/// The whole model written a second time, in float64, with plain tensor products, loops over
/// experts and LibTorch's own autograd: nothing of ops/, mla/ or moe/ is used. What the model's
/// loss and gradients are held against.
class PlainModel {
 public:
  /// Copies every parameter's value as a float64 leaf.
  PlainModel(const ModelConfig& config, const ParameterSet& parameters);

  struct Losses {
    at::Tensor main_sum;                       // Σ over valid labels
    std::vector<at::Tensor> mtp_sums;          // per depth
    at::Tensor balance_sum;                    // Σ over layers and sequences of Σ_i f_i P_i
    std::vector<std::vector<int64_t>> counts;  // per MoE layer: tokens per expert
  };

  /// tokens and labels: B rows of S ids; a label < 0 has no loss.
  Losses losses(const std::vector<std::vector<int64_t>>& tokens,
                const std::vector<std::vector<int64_t>>& labels, int64_t mtp_depths);

  std::map<std::string, at::Tensor> values;  // by our parameter names

 private:
  at::Tensor norm(const at::Tensor& x, const std::string& name, double eps) const;
  at::Tensor rotate(const at::Tensor& x) const;
  at::Tensor attention(const at::Tensor& x, int64_t layer) const;
  at::Tensor mlp(const at::Tensor& x, const std::string& prefix) const;
  at::Tensor moe(const at::Tensor& x, int64_t layer, Losses& losses,
                 std::vector<int64_t>& counts) const;
  at::Tensor block(const at::Tensor& x, int64_t layer, bool is_moe, Losses& losses,
                   std::vector<int64_t>* counts) const;
  at::Tensor token_losses(const at::Tensor& hidden, const std::vector<int64_t>& labels) const;

  ModelConfig config_;
};

}  // namespace dsv3::testing
