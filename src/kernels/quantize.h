#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/kernel.h"

// FP8 with one FP32 scale per tile of 128 elements (DeepSeek-V3, arXiv:2412.19437 §3.3.2): numbers
// are E4M3 (largest finite 448), value = code · scale. Letters: T tokens (or rows), K width, all of
// any size; the last tile of a row or column may be partial.
//
// A tile's numbers, the same bits on every device:
//   amax    = max |x| over the tile (NaN passed over), at least min_amax
//   scale   = amax / 448, with power_of_two rounded up to one
//   inverse = 448 / amax, with power_of_two 1 / scale
//   code    = x · inverse, rounded to nearest even, saturating at ±448
// Divisions and products are IEEE FP32. NaN gives the code 0x7f. An infinity makes its scale
// infinite: the tile's finite elements become 0 and the infinity NaN, so that value = code · scale
// is NaN for all of them.

namespace dsv3::kernels {

inline constexpr int64_t kFp8Tile = 128;

struct ScaleRule {
  float min_amax = 0x1p-100f;  // in [2^-100, 2^100]: what an all-zero tile is scaled by
  bool power_of_two = false;
};

/// 1×128 tiles along rows: how a product reads its left operand, and an FP8 linear layer's input.
struct Fp8Rows {
  uint8_t* data = nullptr;   // [T, K] contiguous; null = not wanted
  float* scales = nullptr;   // of tile j of row t: scales[j · scale_stride + t]
  int64_t scale_stride = 0;  // ≥ T. A multiple of 4 (16 bytes) for a TMA, as DeepGEMM's SM90
                             // kernels read it; exactly T for LibTorch's _scaled_mm
};

/// 128×1 tiles along columns, transposed: both operands of a weight's gradient, whose products sum
/// over tokens. Tp = T rounded up to 128; tokens in [T, Tp) are zeros.
struct Fp8Columns {
  uint8_t* data = nullptr;  // [K, Tp] contiguous, 16-byte aligned; null = not wanted
  float* scales = nullptr;  // of tile i (tokens 128·i …) of column k: scales[i · scale_stride + k]
  int64_t scale_stride = 0;  // ≥ K; a multiple of 4 for a TMA
};

/// Rows in groups (tokens of experts). Group e is rows [ends[e-1], ends[e]) of the input; in the
/// output it starts at the sum of the earlier groups' sizes, each rounded up to 128, and the rows
/// up to the next multiple of 128, and all rows after the last group, are zeros.
struct RaggedGroups {
  int32_t num_groups = 0;         // E ≤ 1024; 0 = one group: rows stay where they are
  const int32_t* ends = nullptr;  // [E] on the device, ascending, ends[E-1] ≤ T
  int64_t padded_rows = 0;        // of the output: a multiple of 128, enough for every group;
                                  // T + 127·E, rounded up, always is
};

/// x → `rows`, `columns` or both, reading x once. With groups both outputs have padded_rows tokens.
/// From kF8E4M3 (re-quantisation): x is 1×128 tiles and x = code · scale, rounded to FP32.
struct QuantizeTiles {
  int64_t num_tokens;               // T
  int64_t width;                    // K
  int64_t x_stride;                 // of x's rows
  DType dtype;                      // of x: kF32, kBF16 or kF8E4M3
  const void* x;                    // [T, K], rows x_stride apart
  const float* x_scales = nullptr;  // of kF8E4M3: as Fp8Rows::scales
  int64_t x_scale_stride = 0;
  ScaleRule rule = {};
  Fp8Rows rows = {};
  Fp8Columns columns = {};
  RaggedGroups groups = {};
};

/// 128×128 blocks: weights. Block (i, j) has scales[i · scale_stride + j].
struct QuantizeBlocks {
  int64_t num_rows;  // N
  int64_t width;     // K
  int64_t x_stride;  // of x's rows
  DType dtype;       // of x: kF32 or kBF16
  const void* x;     // [N, K], rows x_stride apart
  ScaleRule rule = {};
  uint8_t* data;         // [N, K] contiguous
  float* scales;         // [ceil(N / 128), scale_stride]
  int64_t scale_stride;  // ≥ ceil(K / 128)
};

enum class Fp8Tiling : uint8_t { kRows, kColumns, kBlocks };

/// y = code · scale, rounded to y's dtype. Reads T·K bytes.
struct Dequantize {
  Fp8Tiling tiling;
  int64_t num_tokens;    // T (kBlocks: N)
  int64_t width;         // K
  const uint8_t* data;   // kRows, kBlocks: [T, K] contiguous; kColumns: [K, data_stride]
  int64_t data_stride;   // kColumns: tokens from one column to the next; else unused
  const float* scales;   // as Fp8Rows, Fp8Columns or QuantizeBlocks say
  int64_t scale_stride;  // of the same
  DType dtype;           // of y: kF32 or kBF16
  void* y;               // [T, K] contiguous
};

/// Puts tokens into a paged latent cache: slot = block · block_size + offset. kBF16: a slot is
/// [latent | rope], C + R numbers. kF8E4M3: FlashMLA's token, C codes in tiles of 128, their C/128
/// FP32 scales, then R BF16 numbers: 512 + 16 + 128 = 656 bytes at V3's sizes.
struct LatentCacheWrite {
  int64_t num_tokens;     // T
  int64_t latent_dim;     // C; for kF8E4M3 a multiple of 128
  int64_t rope_dim;       // R
  int64_t num_slots;      // of the cache
  int64_t latent_stride;  // of latent's rows
  int64_t rope_stride;    // of rope's rows
  DType dtype;            // of latent and rope: kF32 or kBF16
  const void* latent;     // [T, C]: normalised c_kv
  const void* rope;       // [T, R]: the rotated shared key
  const int32_t* slots;   // [T]: where token t goes; outside [0, num_slots): nowhere. No slot twice
  ScaleRule rule = {};    // of kF8E4M3
  DType cache_dtype;      // kBF16 or kF8E4M3
  void* cache;            // [num_slots, latent_cache_bytes()], 16-byte aligned
};
/// Bytes of one slot.
int64_t latent_cache_bytes(int64_t latent_dim, int64_t rope_dim, DType cache_dtype);

DSV3_DECLARE_KERNEL(quantize_tiles, QuantizeTiles)
DSV3_DECLARE_KERNEL(quantize_blocks, QuantizeBlocks)
DSV3_DECLARE_KERNEL(dequantize, Dequantize)
DSV3_DECLARE_KERNEL(latent_cache_write, LatentCacheWrite)

}  // namespace dsv3::kernels
