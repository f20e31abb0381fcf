#include "checkpoint/weights.h"

#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>

#include "base/error.h"

namespace dsv3 {
namespace {

constexpr size_t kListed = 12;  // names listed in one message

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

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

/// Everything wrong with a checkpoint, by kind, for one message.
struct Problems {
  std::vector<std::string> missing, unexpected, wrong;

  static std::string list(const char* kind, const std::vector<std::string>& names) {
    if (names.empty()) return "";
    std::string text = fmt::format("\n  {} ({}):", kind, names.size());
    for (size_t i = 0; i < std::min(names.size(), kListed); ++i) text += " " + names[i] + ";";
    if (names.size() > kListed) text += fmt::format(" and {} more;", names.size() - kListed);
    text.pop_back();
    return text;
  }
  void raise(const std::filesystem::path& directory) const {
    if (missing.empty() && unexpected.empty() && wrong.empty()) return;
    invalid("{}: the weights do not fit the model{}{}{}", directory.string(),
            list("missing", missing), list("unexpected", unexpected), list("wrong", wrong));
  }
};

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

  void judge(const std::string& name, Problems& problems) const {
    if (name.ends_with("rotary_emb.inv_freq")) return;
    if (name == "lm_head.weight") return;  // unclaimed only when the head is the embedding
    if (name.ends_with(".e_score_correction_bias") && all_zero(*files_.find(name))) return;
    const auto layer = layer_of(name);
    if (layer && *layer >= num_layers_) {
      if (!declared_layers_.contains(*layer)) return;
      if (name.ends_with(".embed_tokens.weight")) {
        return judge_copy(name, "model.embed_tokens.weight", problems);
      }
      if (name.ends_with(".shared_head.head.weight")) {
        const bool tied = files_.find("lm_head.weight") == nullptr;
        return judge_copy(name, tied ? "model.embed_tokens.weight" : "lm_head.weight", problems);
      }
    }
    problems.unexpected.push_back(name);
  }

 private:
  void judge_copy(const std::string& name, const std::string& original, Problems& problems) const {
    const StoredTensor* source = files_.find(original);
    if (source == nullptr || !same_numbers(*files_.find(name), *source, files_)) {
      problems.wrong.push_back(
          fmt::format("{} differs from {}, which it must copy", name, original));
    }
  }

  const WeightFiles& files_;
  const std::set<std::string>& claimed_;
  int64_t num_layers_;
  std::set<int64_t> declared_layers_;
};

void fill(const StoredTensor& stored, const std::filesystem::path& file, const at::Tensor& target) {
  const bool direct = target.is_cpu() && target.is_contiguous();
  if (direct && target.scalar_type() == at::kFloat) {
    return read_as_float(stored, file, target.mutable_data_ptr<float>());
  }
  if (direct && target.scalar_type() == at::kBFloat16 && stored.type == StoredType::kBF16) {
    std::memcpy(target.mutable_data_ptr(), stored.bytes.data(), stored.bytes.size());
    return;
  }
  const at::Tensor staging = at::empty(target.sizes(), at::TensorOptions(at::kFloat));
  read_as_float(stored, file, staging.mutable_data_ptr<float>());
  target.copy_(staging);
}

}  // namespace

void load_weights(const std::filesystem::path& directory, ParameterSet& parameters,
                  int64_t num_layers) {
  const c10::AutoGradMode no_gradients(false);
  const WeightFiles files(directory);
  Problems problems;
  std::set<std::string> claimed;
  for (const auto& parameter : parameters.parameters()) {
    for (const auto& piece : parameter.spec.pieces) {
      claimed.insert(piece.name);
      const StoredTensor* stored = files.find(piece.name);
      if (stored == nullptr) {
        problems.missing.push_back(piece.name);
        continue;
      }
      const auto expected = parameter.piece_view(piece, parameter.value()).sizes().vec();
      if (stored->shape != expected) {
        problems.wrong.push_back(fmt::format("{}: expected shape {}, got {}", piece.name,
                                             shape_text(expected), shape_text(stored->shape)));
      }
    }
  }
  const Leftovers leftovers(files, claimed, num_layers);
  for (const auto& name : files.names()) {
    if (!claimed.contains(name)) leftovers.judge(name, problems);
  }
  problems.raise(directory);
  for (auto& parameter : parameters.parameters()) {
    for (const auto& piece : parameter.spec.pieces) {
      fill(*files.find(piece.name), files.file_of(piece.name),
           parameter.piece_view(piece, parameter.value().detach()));
    }
  }
}

}  // namespace dsv3
