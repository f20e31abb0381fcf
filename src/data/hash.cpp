#include "data/hash.h"

#include "base/error.h"

namespace dsv3 {

Permutation::Permutation(uint64_t size, uint64_t seed) : size_(size), seed_(seed) {
  DSV3_CHECK(size > 0 && size < (uint64_t{1} << 62), "size {}", size);
  while ((uint64_t{1} << (2 * half_bits_)) < size) ++half_bits_;
}

uint64_t Permutation::operator()(uint64_t index) const {
  DSV3_CHECK(index < size_, "index {} of {}", index, size_);
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  uint64_t value = index;
  do {
    uint64_t left = value >> half_bits_, right = value & mask;
    for (uint64_t round = 0; round < 6; ++round) {
      const uint64_t mixed = left ^ (hash_index(seed_ + round, right) & mask);
      left = right;
      right = mixed;
    }
    value = (left << half_bits_) | right;
  } while (value >= size_);
  return value;
}

}  // namespace dsv3
