#pragma once

// Building blocks of the host's attention: vectors, packing, and a small matrix product.
// Included by the kernels/attention_cpu_*.cpp, each compiled for its own instruction set; so
// everything here has internal linkage and calls no inline function of the standard library (the
// linker could pick one compiled for instructions that the machine lacks).

#include <cstddef>
#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace dsv3::kernels::detail {
namespace {

// A vector is one register, and a product's register block kRows × kVectors accumulators.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
constexpr int kRows = 6, kVectors = 4;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int64_t kLanes = 4;
constexpr int kRows = 6, kVectors = 2;
#endif

constexpr int64_t kTile = 64;  // queries and keys per tile
constexpr int64_t kTileVectors = kTile / kLanes;

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));
using FloatsAt = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
using WordsAt = uint32_t __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
// Rows of an odd number of halves begin at any multiple of 2 bytes.
using PairsAt = uint32_t __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
using IntsAt = int32_t __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
using HalvesAt = uint16_t __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

template <int...>
struct Sequence {};
template <int kCount, int... kRest>
struct MakeSequence : MakeSequence<kCount - 1, kCount - 1, kRest...> {};
template <int... kRest>
struct MakeSequence<0, kRest...> {
  using Type = Sequence<kRest...>;
};
using LaneSequence = MakeSequence<kLanes>::Type;

/// How elements travel through the products. The packed unit is always 4 bytes: a float, or a pair
/// of bfloat16 along the summed dimension.
enum class Mode { kFloat, kWidened, kPairs };  // FP32; BF16 widened to FP32; BF16 dot products

constexpr int64_t per_unit(Mode mode) {
  return mode == Mode::kPairs ? 2 : 1;
}
constexpr int64_t element_size(Mode mode) {
  return mode == Mode::kFloat ? 4 : 2;
}
constexpr int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}
constexpr int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

inline Floats load(const float* p) {
  return *reinterpret_cast<const FloatsAt*>(p);
}
inline void store(float* p, Floats x) {
  *reinterpret_cast<FloatsAt*>(p) = x;
}
inline Words load(const uint32_t* p) {
  return *reinterpret_cast<const WordsAt*>(p);
}
inline void store(uint32_t* p, Words x) {
  *reinterpret_cast<WordsAt*>(p) = x;
}
inline Ints load(const int32_t* p) {
  return *reinterpret_cast<const IntsAt*>(p);
}
inline Floats splat(float x) {
  return Floats{} + x;
}
inline Floats larger(Floats a, Floats b) {
  return a > b ? a : b;
}

/// Rounds to nearest even, as bits in the low half of each lane; for finite numbers and infinities.
inline Words to_bf16(Floats x) {
#if defined(__AVX512BF16__)
  return __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)x), Words);
#else
  const Words bits = reinterpret_cast<Words>(x);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
#endif
}

/// 2^x for x <= 0 within 2e-8 of relative error; 0 below -125.
inline Floats exp2_negative(Floats x) {
  const Floats magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  const Floats shifted = x + magic;
  const Floats f = x - (shifted - magic);
  Floats y = splat(1.5469732e-4f);
  y = y * f + 1.3400433e-3f;
  y = y * f + 9.6180253e-3f;
  y = y * f + 5.5503272e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  const Words power = reinterpret_cast<Words>(shifted) << 23;
  const Floats scaled = reinterpret_cast<Floats>(reinterpret_cast<Words>(y) + power);
  return x < -125.0f ? Floats{} : scaled;
}

/// Up to kLanes elements as packed halves or floats; lanes past `count` are zero.
inline Words load_halves(const uint16_t* p, int64_t count) {
  if (count >= kLanes) return __builtin_convertvector(*reinterpret_cast<const HalvesAt*>(p), Words);
  Halves x{};
  if (count > 0) __builtin_memcpy(&x, p, static_cast<size_t>(count) * 2);
  return __builtin_convertvector(x, Words);
}

/// Up to 2·kLanes halves as pairs; halves past `count` are zero.
inline Words load_pairs(const char* p, int64_t count) {
  if (count >= 2 * kLanes) return *reinterpret_cast<const PairsAt*>(p);
#if defined(__AVX512BF16__)
  // Note: bytes copied through memory would stall the load that follows.
  const auto mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  return (Words)_mm512_maskz_loadu_epi16(mask, p);
#else
  Words x{};
  __builtin_memcpy(&x, p, static_cast<size_t>(count) * 2);
  return x;
#endif
}

template <Mode kMode>
Floats load_elements(const void* row, int64_t begin, int64_t count) {
  if constexpr (kMode == Mode::kFloat) {
    const float* p = static_cast<const float*>(row) + begin;
    if (count >= kLanes) return load(p);
    Floats x{};
    if (count > 0) __builtin_memcpy(&x, p, static_cast<size_t>(count) * 4);
    return x;
  } else {
    return reinterpret_cast<Floats>(load_halves(static_cast<const uint16_t*>(row) + begin, count)
                                    << 16);
  }
}

template <Mode kMode>
void store_elements(void* row, int64_t begin, int64_t count, Floats x) {
  if constexpr (kMode == Mode::kFloat) {
    float* p = static_cast<float*>(row) + begin;
    if (count >= kLanes) {
      store(p, x);
    } else {
      __builtin_memcpy(p, &x, static_cast<size_t>(count) * 4);
    }
  } else {
    const Halves halves = __builtin_convertvector(to_bf16(x), Halves);
    const int64_t bytes = smaller(count, kLanes) * 2;
    uint16_t* p = static_cast<uint16_t*>(row) + begin;
    if (bytes == kLanes * 2) {
      *reinterpret_cast<HalvesAt*>(p) = halves;
    } else {
      __builtin_memcpy(p, &halves, static_cast<size_t>(bytes));
    }
  }
}

/// Rows of an operand in memory: `count` valid ones of `dim` elements, `stride` bytes apart.
struct Rows {
  const char* data;
  int64_t stride;
  int64_t count;
  int64_t dim;
  const char* row(int64_t i) const { return data + i * stride; }
};

/// Units per packed row along the dim (rounded up to whole vectors).
template <Mode kMode>
constexpr int64_t packed_width(int64_t dim) {
  return round_up((dim + per_unit(kMode) - 1) / per_unit(kMode), kLanes);
}

/// out[r][u]: row r as units along its dim; zeros behind. kTile rows of packed_width units.
template <Mode kMode>
void pack_rows(const Rows& rows, uint32_t* out) {
  const int64_t width = packed_width<kMode>(rows.dim);
  for (int64_t r = 0; r < kTile; ++r, out += width) {
    if (r >= rows.count) {
      for (int64_t u = 0; u < width; u += kLanes) store(out + u, Words{});
    } else if constexpr (kMode == Mode::kPairs) {
      for (int64_t u = 0; u < width; u += kLanes) {
        store(out + u, load_pairs(rows.row(r) + u * 4, rows.dim - u * 2));
      }
    } else {
      for (int64_t u = 0; u < width; u += kLanes) {
        store(reinterpret_cast<float*>(out + u),
              load_elements<kMode>(rows.row(r), u, rows.dim - u));
      }
    }
  }
}

/// out[r][d]: units along the ROWS, one per element of the dim; round_up(dim, kLanes) units a row,
/// kTile / per_unit rows.
template <Mode kMode>
void pack_columns(const Rows& rows, uint32_t* out) {
  const int64_t width = round_up(rows.dim, kLanes);
  for (int64_t r = 0; r < kTile; r += per_unit(kMode), out += width) {
    for (int64_t d = 0; d < width; d += kLanes) {
      const int64_t left = rows.dim - d;
      if constexpr (kMode == Mode::kPairs) {
        const auto* low = reinterpret_cast<const uint16_t*>(rows.row(r));
        const auto* high = reinterpret_cast<const uint16_t*>(rows.row(r + 1));
        Words unit = r < rows.count ? load_halves(low + d, left) : Words{};
        if (r + 1 < rows.count) unit |= load_halves(high + d, left) << 16;
        store(out + d, unit);
      } else {
        const Floats x = r < rows.count ? load_elements<kMode>(rows.row(r), d, left) : Floats{};
        store(reinterpret_cast<float*>(out + d), x);
      }
    }
  }
}

template <int kStep, int... kLane>
void exchange(Words& a, Words& b, Sequence<kLane...>) {
  const Words low =
      __builtin_shufflevector(a, b, ((kLane & kStep) != 0 ? kLanes + (kLane ^ kStep) : kLane)...);
  b = __builtin_shufflevector(a, b, ((kLane & kStep) != 0 ? kLanes + kLane : kLane ^ kStep)...);
  a = low;
}

/// Transposes by halves: each step swaps what stands off the diagonal of blocks of 2·kStep.
template <int kStep>
void transpose(Words (&x)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kStep) == 0) exchange<kStep>(x[i], x[i | kStep], LaneSequence{});
  }
  if constexpr (kStep > 1) transpose<kStep / 2>(x);
}

/// out[c][r] = in[r][c] for a block of kLanes × kLanes units.
inline void transpose_block(const uint32_t* in, int64_t in_width, uint32_t* out,
                            int64_t out_width) {
  Words x[kLanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) x[i] = load(in + i * in_width);
  transpose<kLanes / 2>(x);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) store(out + i * out_width, x[i]);
}

/// in [kTile][width] → out [width][kTile]; width a multiple of kLanes.
inline void transpose_rows(const uint32_t* in, int64_t width, uint32_t* out) {
  for (int64_t r = 0; r < kTile; r += kLanes) {
    for (int64_t c = 0; c < width; c += kLanes) {
      transpose_block(in + r * width + c, width, out + c * kTile + r, kTile);
    }
  }
}

/// What a product does with what stands in its output.
enum class Onto { kNothing, kSum, kDecayed };

/// The left operand, read one unit at a time: (m, k) at data + m · row + k · step.
struct Left {
  const uint32_t* data;
  int64_t row;
  int64_t step;
};

/// One register block: c[m][n] = (c[m][n] · decay[n] or 0) + Σ_k a(m, k) · b[k][n].
template <Mode kMode, int kM, int kN>
void multiply_block(const Left& a, const uint32_t* b, int64_t b_width, int64_t steps, float* c,
                    int64_t c_width, Onto onto, const float* decay) {
  Floats sum[kM][kN];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      sum[m][n] = Floats{};
      if (onto != Onto::kNothing) sum[m][n] = load(c + m * c_width + n * kLanes);
      if (onto == Onto::kDecayed) sum[m][n] *= load(decay + n * kLanes);
    }
  }
  const uint32_t* at = a.data;
  for (int64_t k = 0; k < steps; ++k, at += a.step, b += b_width) {
    Words right[kN];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) right[n] = load(b + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const uint32_t unit = at[m * a.row];
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) {
        if constexpr (kMode == Mode::kPairs) {
#if defined(__AVX512BF16__)
          sum[m][n] = (Floats)_mm512_dpbf16_ps((__m512)sum[m][n],
                                               (__m512bh)_mm512_set1_epi32(static_cast<int>(unit)),
                                               (__m512bh)right[n]);
#endif
        } else {
          sum[m][n] += __builtin_bit_cast(float, unit) * reinterpret_cast<Floats>(right[n]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) store(c + m * c_width + n * kLanes, sum[m][n]);
  }
}

/// The right operand: b[k][n], `width` units a row; vectors [begin, end) of it are used.
struct Right {
  const uint32_t* data;
  int64_t width;
  int64_t begin;
  int64_t end;
};

template <Mode kMode, int kM, int kN>
void multiply_columns(const Left& a, const Right& b, int64_t steps, float* c, int64_t c_width,
                      Onto onto, const float* decay) {
  int64_t n = b.begin;
  for (; n + kN <= b.end; n += kN) {
    multiply_block<kMode, kM, kN>(a, b.data + n * kLanes, b.width, steps, c + n * kLanes, c_width,
                                  onto, decay == nullptr ? nullptr : decay + n * kLanes);
  }
  if constexpr (kN > 1) {
    if (n < b.end) {
      multiply_columns<kMode, kM, kN - 1>(a, {b.data, b.width, n, b.end}, steps, c, c_width, onto,
                                          decay);
    }
  }
}

template <Mode kMode, int kM>
void multiply_tail(const Left& a, int64_t rows, const Right& b, int64_t steps, float* c,
                   int64_t c_width, Onto onto, const float* decay) {
  if constexpr (kM > 0) {
    if (rows == kM) {
      multiply_columns<kMode, kM, kVectors>(a, b, steps, c, c_width, onto, decay);
    } else {
      multiply_tail<kMode, kM - 1>(a, rows, b, steps, c, c_width, onto, decay);
    }
  }
}

/// c [rows][c_width] (+)= a · b over `steps` units. Onto::kDecayed first scales each lane of c.
template <Mode kMode>
void multiply(const Left& a, int64_t rows, const Right& b, int64_t steps, float* c, int64_t c_width,
              Onto onto, const float* decay = nullptr) {
  for (int64_t m = 0; m < rows; m += kRows) {
    const Left from{a.data + m * a.row, a.row, a.step};
    multiply_tail<kMode, kRows>(from, smaller(kRows, rows - m), b, steps, c + m * c_width, c_width,
                                onto, decay);
  }
}

}  // namespace
}  // namespace dsv3::kernels::detail
