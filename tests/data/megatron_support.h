#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "data/data_support.h"

namespace dsv3::test {

template <typename T>
void append(std::string& bytes, T value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
}

/// The two files of a Megatron pair, as IndexedDatasetBuilder lays them out.
struct MegatronPair {
  std::string index, data;
  void save(const std::filesystem::path& prefix) const {
    write(prefix.string() + ".idx", index);
    write(prefix.string() + ".bin", data);
  }
};

inline void append_token(std::string& data, int code, int64_t token) {
  switch (code) {
    case 1:
      append(data, static_cast<uint8_t>(token));
      break;
    case 2:
      append(data, static_cast<int8_t>(token));
      break;
    case 3:
      append(data, static_cast<int16_t>(token));
      break;
    case 4:
      append(data, static_cast<int32_t>(token));
      break;
    case 5:
      append(data, token);
      break;
    case 6:
      append(data, static_cast<double>(token));
      break;
    case 7:
      append(data, static_cast<float>(token));
      break;
    default:
      append(data, static_cast<uint16_t>(token));
      break;
  }
}

/// documents[d] is a list of sequences of tokens.
inline MegatronPair megatron_pair(const std::vector<std::vector<std::vector<int32_t>>>& documents,
                                  int code) {
  MegatronPair pair;
  std::vector<int32_t> lengths;
  std::vector<int64_t> pointers, entries{0};
  for (const auto& document : documents) {
    for (const auto& sequence : document) {
      lengths.push_back(static_cast<int32_t>(sequence.size()));
      pointers.push_back(static_cast<int64_t>(pair.data.size()));
      for (const int32_t token : sequence) append_token(pair.data, code, token);
    }
    entries.push_back(static_cast<int64_t>(lengths.size()));
  }
  pair.index = std::string("MMIDIDX\0\0", 9);
  append(pair.index, uint64_t{1});
  append(pair.index, static_cast<uint8_t>(code));
  append(pair.index, static_cast<uint64_t>(lengths.size()));
  append(pair.index, static_cast<uint64_t>(entries.size()));
  for (const auto length : lengths) append(pair.index, length);
  for (const auto pointer : pointers) append(pair.index, pointer);
  for (const auto entry : entries) append(pair.index, entry);
  return pair;
}

}  // namespace dsv3::test
