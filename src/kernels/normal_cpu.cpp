// Normal numbers on the host: counters over threads, Box-Muller in float64 so that the device's
// FP32 result is within its own rounding of this one.
#include <cmath>
#include <numbers>

#include "kernels/detail/cpu.h"
#include "kernels/detail/philox.h"
#include "kernels/optimizer.h"

namespace dsv3::kernels::cpu {
namespace {

/// The four normals of one counter.
void four_normals(uint64_t seed, uint64_t stream, uint64_t counter, float (&n)[4]) {
  const auto words = kernels::detail::philox4x32(seed, counter, stream);
  for (int pair = 0; pair < 2; ++pair) {
    const double u = kernels::detail::unit_above_zero(words.word[2 * pair]);
    const double angle =
        2.0 * std::numbers::pi * kernels::detail::unit_below_one(words.word[2 * pair + 1]);
    const double radius = std::sqrt(-2.0 * std::log(u));
    n[2 * pair] = static_cast<float>(radius * std::cos(angle));
    n[2 * pair + 1] = static_cast<float>(radius * std::sin(angle));
  }
}

template <typename T>
void fill(const NormalFill& p, T* y, int64_t global, int64_t count) {
  float n[4];
  for (int64_t i = 0; i < count;) {
    const int64_t lane = (global + i) % 4;
    four_normals(p.seed, p.stream, static_cast<uint64_t>(global + i) / 4, n);
    for (int64_t j = lane; j < 4 && i < count; ++j, ++i)
      detail::store(&y[i], p.mean + p.std * n[j]);
  }
}

/// Numbers that one task fills: rows alone may be few and long.
constexpr int64_t kBlock = 4096;

}  // namespace

void normal_fill(const NormalFill& p) {
  require(p.first >= 0 && p.pitch >= 0, "[normal_fill] global indices must not be negative");
  const int64_t blocks = (p.columns + kBlock - 1) / kBlock;
  detail::dispatch_float("normal_fill", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    detail::parallel_rows(
        p.rows * blocks, std::min(kBlock, p.columns) * 64, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / blocks, column = i % blocks * kBlock;
            fill(p, static_cast<T*>(p.y) + row * p.stride + column,
                 p.first + row * p.pitch + column, std::min(kBlock, p.columns - column));
          }
        });
  });
}

}  // namespace dsv3::kernels::cpu
