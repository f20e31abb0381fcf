#include "checkpoint/tensor_files.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "base/file.h"

namespace dsv3::detail {
namespace {

namespace fs = std::filesystem;

constexpr size_t kListed = 12;  // names listed in one message

std::optional<StoredType> stored_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return StoredType::kF32;
    case at::kBFloat16:
      return StoredType::kBF16;
    case at::kDouble:
      return StoredType::kF64;
    default:
      return std::nullopt;
  }
}

void write_shard(const fs::path& directory, const std::string& name,
                 std::span<const NamedTensor> tensors, Manifest& manifest) {
  std::vector<TensorPlan> plan;
  std::map<std::string, const at::Tensor*> by_name;
  for (const NamedTensor& tensor : tensors) {
    const auto type = stored_type(tensor.view.scalar_type());
    require(type.has_value(), "weights are saved in fp32, bf16 or fp64, not {}",
            c10::toString(tensor.view.scalar_type()));
    plan.push_back({tensor.name, *type, tensor.view.sizes().vec()});
    by_name[tensor.name] = &tensor.view;
  }
  SafetensorsWriter writer(directory / name, std::move(plan));
  for (const TensorPlan& tensor : writer.order()) {
    const at::Tensor host = by_name.at(tensor.name)->cpu().contiguous();
    writer.write(
        {static_cast<const std::byte*>(host.const_data_ptr()), static_cast<size_t>(host.nbytes())});
  }
  writer.commit();
  manifest.files[name] = {writer.size(), writer.checksum()};
}

std::vector<std::span<const NamedTensor>> split(const std::vector<NamedTensor>& tensors,
                                                uint64_t max_bytes) {
  std::vector<std::span<const NamedTensor>> shards;
  const std::span<const NamedTensor> all(tensors);
  size_t begin = 0;
  uint64_t bytes = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    if (bytes > 0 && bytes + all[i].view.nbytes() > max_bytes) {
      shards.push_back(all.subspan(begin, i - begin));
      begin = i;
      bytes = 0;
    }
    bytes += all[i].view.nbytes();
  }
  shards.push_back(all.subspan(begin));
  return shards;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

std::string list(const char* kind, const std::vector<std::string>& names) {
  if (names.empty()) return "";
  std::string text = fmt::format("\n  {} ({}):", kind, names.size());
  for (size_t i = 0; i < std::min(names.size(), kListed); ++i) text += " " + names[i] + ";";
  if (names.size() > kListed) text += fmt::format(" and {} more;", names.size() - kListed);
  text.pop_back();
  return text;
}

}  // namespace

void write_text(const fs::path& directory, const std::string& name, const std::string& content,
                Manifest& manifest) {
  AtomicFile file(directory / name);
  file.write(content.data(), content.size());
  file.commit();
  manifest.files[name] = {file.size(), file.checksum()};
}

void write_tensors(const fs::path& directory, const std::string& stem,
                   const std::vector<NamedTensor>& tensors, uint64_t max_shard_bytes,
                   Manifest& manifest) {
  const auto shards = split(tensors, max_shard_bytes);
  if (shards.size() == 1) return write_shard(directory, stem + ".safetensors", shards[0], manifest);
  nlohmann::ordered_json index;
  uint64_t total = 0;
  std::map<std::string, std::string> weight_map;
  for (size_t i = 0; i < shards.size(); ++i) {
    const auto name = fmt::format("{}-{:05}-of-{:05}.safetensors", stem, i + 1, shards.size());
    for (const NamedTensor& tensor : shards[i]) {
      weight_map[tensor.name] = name;
      total += tensor.view.nbytes();
    }
    write_shard(directory, name, shards[i], manifest);
  }
  index["metadata"]["total_size"] = total;
  index["weight_map"] = weight_map;
  write_text(directory, stem + ".safetensors.index.json", index.dump(2) + "\n", manifest);
}

void fill(const StoredTensor& stored, const fs::path& file, const at::Tensor& target) {
  const bool direct = target.is_cpu() && target.is_contiguous();
  if (stored_type(target.scalar_type()) == stored.type) {
    const at::Tensor host =
        direct ? target : at::empty(target.sizes(), target.options().device(at::kCPU));
    DSV3_CHECK(host.nbytes() == stored.bytes.size(), "{}: {} bytes into {}", stored.name,
               stored.bytes.size(), host.nbytes());
    if (!stored.bytes.empty())
      std::memcpy(host.mutable_data_ptr(), stored.bytes.data(), stored.bytes.size());
    if (!direct) target.copy_(host);
    return;
  }
  if (direct && target.scalar_type() == at::kFloat)
    return read_as_float(stored, file, target.mutable_data_ptr<float>());
  const at::Tensor staging = at::empty(target.sizes(), at::TensorOptions(at::kFloat));
  read_as_float(stored, file, staging.mutable_data_ptr<float>());
  target.copy_(staging);
}

void NameCheck::expect(const std::string& name, const std::vector<int64_t>& shape) {
  expected_.insert(name);
  const StoredTensor* stored = files_.find(name);
  if (stored == nullptr) {
    missing_.push_back(name);
  } else if (stored->shape != shape) {
    wrong_.push_back(fmt::format("{}: expected shape {}, got {}", name, shape_text(shape),
                                 shape_text(stored->shape)));
  }
}

void NameCheck::raise(const fs::path& directory, const std::string& summary) const {
  if (missing_.empty() && unexpected_.empty() && wrong_.empty()) return;
  invalid("{}: {}{}{}{}", directory.string(), summary, list("missing", missing_),
          list("unexpected", unexpected_), list("wrong", wrong_));
}

}  // namespace dsv3::detail
