#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
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
    // Smallest gap between a score that was chosen and one that was not: narrow rounding decides
    // such a choice otherwise, and then nothing can be compared.
    double narrowest = std::numeric_limits<double>::infinity();
  };

  /// tokens and labels: B rows of S ids; a label < 0 has no loss. lengths [B]: how many tokens of a
  /// row are real, the rest is padding (empty: all are).
  Losses losses(const std::vector<std::vector<int64_t>>& tokens,
                const std::vector<std::vector<int64_t>>& labels, int64_t mtp_depths,
                const std::vector<int64_t>& lengths = {});

  std::map<std::string, at::Tensor> values;  // by our parameter names

 private:
  at::Tensor norm(const at::Tensor& x, const std::string& name, double eps) const;
  at::Tensor rotate(const at::Tensor& x) const;
  at::Tensor attention(const at::Tensor& x, int64_t layer) const;
  at::Tensor mlp(const at::Tensor& x, const std::string& prefix) const;
  /// The first num_valid tokens of x count in the statistics.
  at::Tensor moe(const at::Tensor& x, int64_t layer, int64_t num_valid, Losses& losses,
                 std::vector<int64_t>& counts) const;
  at::Tensor block(const at::Tensor& x, int64_t layer, bool is_moe, int64_t num_valid,
                   Losses& losses, std::vector<int64_t>* counts) const;
  at::Tensor token_losses(const at::Tensor& hidden, const std::vector<int64_t>& labels) const;

  ModelConfig config_;
};

}  // namespace dsv3::testing
