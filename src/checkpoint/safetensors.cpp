#include "checkpoint/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>

#include "base/bfloat16.h"
#include "base/error.h"
#include "checkpoint/strict_json.h"

namespace dsv3 {

using detail::broken, detail::is_file_name, detail::parse_strictly, detail::shown;

namespace {

using Json = nlohmann::json;

constexpr uint64_t kMaxHeader = 100'000'000;  // the format's own limit
constexpr size_t kMaxRank = 16;

struct TypeInfo {
  const char* name;
  int64_t size;
};
constexpr std::array<TypeInfo, 15> kTypes = {{{"BOOL", 1},
                                              {"U8", 1},
                                              {"I8", 1},
                                              {"F8_E5M2", 1},
                                              {"F8_E4M3", 1},
                                              {"I16", 2},
                                              {"U16", 2},
                                              {"F16", 2},
                                              {"BF16", 2},
                                              {"I32", 4},
                                              {"U32", 4},
                                              {"F32", 4},
                                              {"F64", 8},
                                              {"I64", 8},
                                              {"U64", 8}}};

StoredType parse_type(const Json& value, const std::filesystem::path& path,
                      const std::string& name) {
  if (!value.is_string()) broken(path, "tensor '{}': dtype is not a string", shown(name));
  const auto& text = value.get_ref<const std::string&>();
  for (size_t i = 0; i < kTypes.size(); ++i) {
    if (text == kTypes[i].name) return static_cast<StoredType>(i);
  }
  broken(path, "tensor '{}': unknown dtype '{}'", shown(name), shown(text));
}

/// Shape and byte count; every product checked against 2^63.
uint64_t parse_shape(const Json& value, StoredTensor& tensor, const std::filesystem::path& path) {
  if (!value.is_array()) broken(path, "tensor '{}': shape is not a list", shown(tensor.name));
  if (value.size() > kMaxRank) {
    broken(path, "tensor '{}': {} dimensions, at most {} are allowed", shown(tensor.name),
           value.size(), kMaxRank);
  }
  auto bytes = static_cast<uint64_t>(size_of(tensor.type));
  constexpr auto limit = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  for (const Json& dim : value) {
    if (!dim.is_number_unsigned()) {
      broken(path, "tensor '{}': shape holds something that is not a count", shown(tensor.name));
    }
    const auto size = dim.get<uint64_t>();
    if (size > limit || (size != 0 && bytes > limit / size)) {
      broken(path, "tensor '{}': the shape's size overflows", shown(tensor.name));
    }
    bytes *= size;
    tensor.shape.push_back(static_cast<int64_t>(size));
  }
  return bytes;
}

StoredTensor parse_tensor(const std::string& name, const Json& entry,
                          std::span<const std::byte> data, const std::filesystem::path& path) {
  if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") ||
      !entry.contains("data_offsets")) {
    broken(path, "tensor '{}': expected an object with dtype, shape and data_offsets", shown(name));
  }
  StoredTensor tensor;
  tensor.name = name;
  tensor.type = parse_type(entry["dtype"], path, name);
  const uint64_t expected = parse_shape(entry["shape"], tensor, path);
  const Json& offsets = entry["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    broken(path, "tensor '{}': data_offsets is not a pair of offsets", shown(name));
  }
  const auto begin = offsets[0].get<uint64_t>();
  const auto end = offsets[1].get<uint64_t>();
  if (begin > end || end > data.size()) {
    broken(path, "tensor '{}': data_offsets [{}, {}] leave the {} bytes of data in the file",
           shown(name), begin, end, data.size());
  }
  if (end - begin != expected) {
    broken(path, "tensor '{}': its shape needs {} bytes, data_offsets give {}", shown(name),
           expected, end - begin);
  }
  tensor.bytes = data.subspan(begin, end - begin);
  return tensor;
}

/// The data must be covered exactly: an overlap or a hole is a sign of a broken or hostile file.
void check_coverage(std::vector<StoredTensor>& tensors, std::span<const std::byte> data,
                    const std::filesystem::path& path) {
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    return a.bytes.data() != b.bytes.data() ? a.bytes.data() < b.bytes.data()
                                            : a.bytes.size() < b.bytes.size();
  });
  const std::byte* expected = data.data();
  for (const StoredTensor& tensor : tensors) {
    if (tensor.bytes.data() != expected) {
      broken(path, "tensor '{}': its data {} the tensor's before it", shown(tensor.name),
             tensor.bytes.data() < expected ? "overlaps" : "leaves a hole after");
    }
    expected += tensor.bytes.size();
  }
  const auto rest = static_cast<uint64_t>(data.data() + data.size() - expected);
  if (rest != 0) broken(path, "{} bytes of data belong to no tensor", rest);
}

}  // namespace

int64_t size_of(StoredType type) {
  return kTypes[static_cast<size_t>(type)].size;
}
const char* name_of(StoredType type) {
  return kTypes[static_cast<size_t>(type)].name;
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : file_(path) {
  const auto bytes = file_.bytes();
  if (bytes.size() < 8) {
    broken(path, "{} bytes are too few for a safetensors file", bytes.size());
  }
  uint64_t length = 0;
  for (int i = 0; i < 8; ++i) length |= std::to_integer<uint64_t>(bytes[i]) << (8 * i);
  if (length > kMaxHeader || length > bytes.size() - 8) {
    broken(path, "the header's length {} does not fit the file's {} bytes", length, bytes.size());
  }
  const auto header = bytes.subspan(8, length);
  const auto data = bytes.subspan(8 + length);
  const std::string_view text(reinterpret_cast<const char*>(header.data()), header.size());
  const Json json = parse_strictly(text, path, "the header");
  if (!json.is_object()) broken(path, "the header is not a JSON object");
  for (const auto& [name, entry] : json.items()) {
    if (name != "__metadata__") {
      tensors_.push_back(parse_tensor(name, entry, data, path));
      continue;
    }
    if (!entry.is_object()) broken(path, "__metadata__ is not an object");
    for (const auto& [key, value] : entry.items()) {
      if (!value.is_string()) broken(path, "__metadata__ '{}' is not a string", shown(key));
      metadata_[key] = value.get<std::string>();
    }
  }
  check_coverage(tensors_, data, path);
}

WeightFiles::WeightFiles(const std::filesystem::path& directory, const std::string& stem)
    : directory_(directory) {
  if (!std::filesystem::is_directory(directory)) {
    throw IoError(fmt::format("{} is not a directory", directory.string()));
  }
  const auto index = directory / (stem + ".safetensors.index.json");
  const auto single = directory / (stem + ".safetensors");
  if (std::filesystem::exists(index)) {
    open_shards(index);
  } else if (std::filesystem::exists(single)) {
    files_.push_back(std::make_unique<SafetensorsFile>(single));
    for (const StoredTensor& tensor : files_.back()->tensors()) add(*files_.back(), tensor);
  } else {
    throw IoError(fmt::format("{} holds neither {}.safetensors nor {}.safetensors.index.json",
                              directory.string(), stem, stem));
  }
}

void WeightFiles::open_shards(const std::filesystem::path& index) {
  const Json json = parse_strictly(read_file(index), index, "the index");
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object()) {
    broken(index, "expected an object with 'weight_map'");
  }
  std::map<std::string, std::set<std::string>> shards;  // file -> names the index promises there
  for (const auto& [name, file] : json["weight_map"].items()) {
    if (!file.is_string()) broken(index, "tensor '{}': its file is not a string", shown(name));
    const auto& shard = file.get_ref<const std::string&>();
    if (!is_file_name(shard)) {
      broken(index, "tensor '{}': '{}' is not a file name inside the directory", shown(name),
             shown(shard));
    }
    shards[shard].insert(name);
  }
  for (const auto& [shard, promised] : shards) {
    const auto path = directory_ / shard;
    if (!std::filesystem::exists(path)) broken(index, "shard {} is missing", shown(shard));
    files_.push_back(std::make_unique<SafetensorsFile>(path));
    for (const StoredTensor& tensor : files_.back()->tensors()) {
      if (promised.contains(tensor.name)) add(*files_.back(), tensor);
    }
    for (const std::string& name : promised) {
      if (find(name) == nullptr) {
        broken(index, "tensor '{}' is not in {}, where the index places it", shown(name),
               shown(shard));
      }
    }
  }
}

void WeightFiles::add(const SafetensorsFile& file, const StoredTensor& tensor) {
  places_[tensor.name] = {&tensor, &file};
}

const StoredTensor* WeightFiles::find(const std::string& name) const {
  const auto place = places_.find(name);
  return place == places_.end() ? nullptr : place->second.tensor;
}

const std::filesystem::path& WeightFiles::file_of(const std::string& name) const {
  return places_.at(name).file->path();
}

std::vector<std::string> WeightFiles::names() const {
  std::vector<std::string> result;
  for (const auto& [name, place] : places_) result.push_back(name);
  return result;
}

namespace {

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: mantissa · 2^-24
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
  }
  const uint32_t wide = exponent == 31 ? 0xffu : exponent + 112u;
  return std::bit_cast<float>(sign | (wide << 23) | (mantissa << 13));
}

/// The source may be unaligned, so each element is copied out before it is converted.
template <typename T, typename Convert>
void convert_all(const StoredTensor& tensor, float* out, Convert convert) {
  const std::byte* source = tensor.bytes.data();
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    T value;
    std::memcpy(&value, source + static_cast<size_t>(i) * sizeof(T), sizeof(T));
    out[i] = convert(value);
  }
}

}  // namespace

void read_as_float(const StoredTensor& tensor, const std::filesystem::path& file, float* out) {
  switch (tensor.type) {
    case StoredType::kF32:
      if (!tensor.bytes.empty()) std::memcpy(out, tensor.bytes.data(), tensor.bytes.size());
      return;
    case StoredType::kF64:
      return convert_all<double>(tensor, out, [](double x) { return static_cast<float>(x); });
    case StoredType::kBF16:
      return convert_all<uint16_t>(tensor, out, [](uint16_t x) { return to_float(BFloat16{x}); });
    case StoredType::kF16:
      return convert_all<uint16_t>(tensor, out, half_to_float);
    case StoredType::kF8E4M3:
    case StoredType::kF8E5M2:
      invalid("{}: tensor '{}' is {}: FP8 checkpoints are not read; give one in BF16 or F32",
              file.string(), shown(tensor.name), name_of(tensor.type));
    default:
      invalid("{}: tensor '{}' is {}, expected F32, BF16, F16 or F64", file.string(),
              shown(tensor.name), name_of(tensor.type));
  }
}

uint64_t TensorPlan::num_bytes() const {
  auto bytes = static_cast<uint64_t>(size_of(type));
  for (const int64_t size : shape) bytes *= static_cast<uint64_t>(size);
  return bytes;
}

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path,
                                     std::vector<TensorPlan> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : tensors_(std::move(tensors)), file_(path) {
  std::sort(tensors_.begin(), tensors_.end(), [](const auto& a, const auto& b) {
    return a.type != b.type ? a.type > b.type : a.name < b.name;
  });
  std::string header = "{";
  if (!metadata.empty()) header += "\"__metadata__\":" + Json(metadata).dump();
  uint64_t offset = 0;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const TensorPlan& tensor = tensors_[i];
    DSV3_CHECK(i == 0 || tensor.name != tensors_[i - 1].name, "tensor '{}' is planned twice",
               tensor.name);
    const uint64_t end = offset + tensor.num_bytes();
    if (header.size() > 1) header += ',';
    header += fmt::format("{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{},{}]}}",
                          Json(tensor.name).dump(), name_of(tensor.type), Json(tensor.shape).dump(),
                          offset, end);
    offset = end;
  }
  header += '}';
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::array<unsigned char, 8> length{};
  for (size_t i = 0; i < 8; ++i) {
    length[i] = static_cast<unsigned char>(static_cast<uint64_t>(header.size()) >> (8 * i));
  }
  file_.write(length.data(), length.size());
  file_.write(header.data(), header.size());
}

void SafetensorsWriter::write(std::span<const std::byte> bytes) {
  DSV3_CHECK(next_ < tensors_.size(), "more tensors written than planned ({})", tensors_.size());
  const TensorPlan& tensor = tensors_[next_];
  require(bytes.size() == tensor.num_bytes(), "tensor '{}': expected {} bytes, got {}", tensor.name,
          tensor.num_bytes(), bytes.size());
  file_.write(bytes.data(), bytes.size());
  ++next_;
}

void SafetensorsWriter::commit() {
  DSV3_CHECK(next_ == tensors_.size(), "{} of {} planned tensors were written", next_,
             tensors_.size());
  file_.commit();
}

}  // namespace dsv3
