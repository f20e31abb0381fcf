#include "checkpoint/weights.h"

#include <c10/core/GradMode.h>

#include <algorithm>
#include <optional>
#include <set>

#include "base/error.h"
#include "checkpoint/tensor_files.h"

namespace dsv3 {
namespace {

/// L of "model.layers.L.…", or nothing.
std::optional<int64_t> layer_of(const std::string& name) {
  constexpr std::string_view kPrefix = "model.layers.";
  if (!name.starts_with(kPrefix)) return std::nullopt;
  int64_t layer = 0;
  size_t i = kPrefix.size();
  while (i < name.size() && name[i] >= '0' && name[i] <= '9' && layer < 1'000'000) {
    layer = layer * 10 + (name[i++] - '0');
  }
  if (i == kPrefix.size() || i >= name.size() || name[i] != '.') return std::nullopt;
  return layer;
}

bool same_numbers(const StoredTensor& a, const StoredTensor& b, const WeightFiles& files) {
  if (a.shape != b.shape) return false;
  if (a.type == b.type) return std::ranges::equal(a.bytes, b.bytes);
  std::vector<float> x(static_cast<size_t>(a.numel())), y(x.size());
  read_as_float(a, files.file_of(a.name), x.data());
  read_as_float(b, files.file_of(b.name), y.data());
  return x == y;
}

bool all_zero(const StoredTensor& tensor) {
  return std::ranges::all_of(tensor.bytes, [](std::byte b) { return b == std::byte{0}; });
}

/// Judges the tensors of the checkpoint that no parameter claims.
class Leftovers {
 public:
  Leftovers(const WeightFiles& files, const std::set<std::string>& claimed, int64_t num_layers)
      : files_(files), claimed_(claimed), num_layers_(num_layers) {
    for (const auto& name : claimed) {
      if (const auto layer = layer_of(name)) declared_layers_.insert(*layer);
    }
  }

  void judge(const std::string& name, detail::NameCheck& check) const {
    if (name.ends_with("rotary_emb.inv_freq")) return;
    // transformers saves the shared expert of a model without one: matrices of no elements.
    if (files_.find(name)->numel() == 0) return;
    if (name == "lm_head.weight") return;  // unclaimed only when the head is the embedding
    if (name.ends_with(".e_score_correction_bias") && all_zero(*files_.find(name))) return;
    const auto layer = layer_of(name);
    if (layer && *layer >= num_layers_) {
      if (!declared_layers_.contains(*layer)) return;
      if (name.ends_with(".embed_tokens.weight")) {
        return judge_copy(name, "model.embed_tokens.weight", check);
      }
      if (name.ends_with(".shared_head.head.weight")) {
        const bool tied = files_.find("lm_head.weight") == nullptr;
        return judge_copy(name, tied ? "model.embed_tokens.weight" : "lm_head.weight", check);
      }
    }
    check.unexpected(name);
  }

 private:
  void judge_copy(const std::string& name, const std::string& original,
                  detail::NameCheck& check) const {
    const StoredTensor* source = files_.find(original);
    if (source == nullptr || !same_numbers(*files_.find(name), *source, files_)) {
      check.wrong(fmt::format("{} differs from {}, which it must copy", name, original));
    }
  }

  const WeightFiles& files_;
  const std::set<std::string>& claimed_;
  int64_t num_layers_;
  std::set<int64_t> declared_layers_;
};

}  // namespace

void load_weights(const std::filesystem::path& directory, ParameterSet& parameters,
                  int64_t num_layers) {
  const c10::AutoGradMode no_gradients(false);
  const WeightFiles files(directory);
  detail::NameCheck check(files);
  for (const auto& parameter : parameters.parameters()) {
    for (const auto& piece : parameter.spec.pieces)
      check.expect(piece.name, parameter.piece_view(piece, parameter.value()).sizes().vec());
  }
  const Leftovers leftovers(files, check.expected(), num_layers);
  for (const auto& name : files.names()) {
    if (!check.expected(name)) leftovers.judge(name, check);
  }
  check.raise(directory, "the weights do not fit the model");
  for (auto& parameter : parameters.parameters()) {
    for (const auto& piece : parameter.spec.pieces) {
      detail::fill(*files.find(piece.name), files.file_of(piece.name),
                   parameter.piece_view(piece, parameter.value().detach()));
    }
  }
}

}  // namespace dsv3
