#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/file.h"

// The safetensors format: 8 bytes header length (little endian), a JSON header, the tensors' bytes.
// https://github.com/huggingface/safetensors, "Format". No LibTorch here.
namespace dsv3 {

/// Element types a file may hold, in the order that the format's own writer sorts by.
enum class StoredType : uint8_t {
  kBool,
  kU8,
  kI8,
  kF8E5M2,
  kF8E4M3,
  kI16,
  kU16,
  kF16,
  kBF16,
  kI32,
  kU32,
  kF32,
  kF64,
  kI64,
  kU64
};

int64_t size_of(StoredType type);
/// The format's spelling: "F32", "BF16", …
const char* name_of(StoredType type);

/// One tensor of a mapped file; `bytes` lives as long as the file object. Not aligned in general.
struct StoredTensor {
  std::string name;
  StoredType type = StoredType::kF32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;  // row-major, little endian

  int64_t numel() const { return static_cast<int64_t>(bytes.size()) / size_of(type); }
};

/// A safetensors file mapped into memory. The header is checked in full when it is opened: lengths,
/// JSON, types, shapes, offsets (inside the file, no overlap, no hole), repeated names. Throws
/// IoError that names the file and the tensor. Nothing is allocated beyond what the header itself
/// describes.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);

  /// In the file's order of data.
  const std::vector<StoredTensor>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::filesystem::path& path() const { return file_.path(); }

 private:
  MappedFile file_;
  std::vector<StoredTensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// The tensors of a checkpoint directory: `STEM.safetensors.index.json` with its shards, or
/// `STEM.safetensors`. Throws IoError when neither is there, a shard is missing, the index names a
/// file outside the directory, or index and shards disagree.
class WeightFiles {
 public:
  explicit WeightFiles(const std::filesystem::path& directory, const std::string& stem = "model");

  /// Null when there is no such tensor.
  const StoredTensor* find(const std::string& name) const;
  /// File that holds `name` (which must exist).
  const std::filesystem::path& file_of(const std::string& name) const;
  /// Sorted.
  std::vector<std::string> names() const;
  const std::filesystem::path& directory() const { return directory_; }

 private:
  struct Place {
    const StoredTensor* tensor = nullptr;
    const SafetensorsFile* file = nullptr;
  };
  void add(const SafetensorsFile& file, const StoredTensor& tensor);
  void open_shards(const std::filesystem::path& index);

  std::filesystem::path directory_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Place> places_;
};

/// Numbers of `tensor` as float32 into `out` (numel values). F64, F32, BF16 and F16 are read;
/// another type is an std::invalid_argument that names `file`, the tensor and its type.
void read_as_float(const StoredTensor& tensor, const std::filesystem::path& file, float* out);

/// What a file is about to hold.
struct TensorPlan {
  std::string name;
  StoredType type = StoredType::kF32;
  std::vector<int64_t> shape;

  uint64_t num_bytes() const;
};

/// Writes a safetensors file tensor by tensor, beside its final name, and renames it there on
/// commit(). The layout is that of the format's own writer (sorted by type, then name; header
/// padded to 8 bytes), so that a file read and written again is equal byte for byte.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::filesystem::path& path, std::vector<TensorPlan> tensors,
                    const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

  /// The tensors in the order in which write() expects them.
  const std::vector<TensorPlan>& order() const { return tensors_; }
  /// The bytes of the next tensor in order(), in one piece. std::invalid_argument when their number
  /// is wrong.
  void write(std::span<const std::byte> bytes);
  /// Throws std::logic_error when tensors are still missing, IoError when the disk fails.
  void commit();

  /// Of the whole file, header included, as far as it is written.
  uint64_t size() const { return file_.size(); }
  uint64_t checksum() const { return file_.checksum(); }

 private:
  std::vector<TensorPlan> tensors_;
  AtomicFile file_;
  size_t next_ = 0;
};

}  // namespace dsv3
