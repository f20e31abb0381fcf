#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace dsv3 {

/// XXH3 of bytes, 64 bits; the same on every machine.
uint64_t hash_bytes(std::string_view bytes, uint64_t seed);

/// XXH3 of bytes that arrive in parts; with seed 0, the same as hash_bytes of them together.
class StreamingHash {
 public:
  StreamingHash();
  ~StreamingHash();
  StreamingHash(const StreamingHash&) = delete;
  StreamingHash& operator=(const StreamingHash&) = delete;
  void update(const void* data, size_t size);
  uint64_t digest() const;

 private:
  void* state_;
};

}  // namespace dsv3
