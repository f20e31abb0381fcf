#pragma once

#include <cstdint>

#include "base/hash.h"

namespace dsv3 {

/// One well-mixed 64-bit value for each (seed, index): the finaliser of splitmix64 (Steele et al.
/// 2014) over a Weyl sequence. Random access, so that nothing depends on how many values were
/// drawn.
constexpr uint64_t hash_index(uint64_t seed, uint64_t index) {
  uint64_t x = seed + (index + 1) * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

/// A number in 0 … bound-1 from 64 random bits, by multiplication; bound >= 1.
constexpr uint64_t below(uint64_t bits, uint64_t bound) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(bits) * bound) >> 64);
}

/// A permutation of 0 … size-1 that is evaluated at one place without being stored: a Feistel
/// network of six rounds over the next even power of two, walked until it lands inside.
class Permutation {
 public:
  Permutation(uint64_t size, uint64_t seed);
  uint64_t operator()(uint64_t index) const;

 private:
  uint64_t size_, seed_;
  uint32_t half_bits_ = 1;
};

}  // namespace dsv3
