#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

// FP8 (E4M3) with one FP32 scale per tile of 128 elements: value = code · scale. Rules and layouts:
// kernels/quantize.h. Codes are at::kFloat8_e4m3fn. Nothing here records a gradient: the operators
// that quantise their output pass it through (rms_norm_fp8, swiglu_fp8).

namespace dsv3::ops {

struct QuantizeOptions {
  double min_amax = 0x1p-100;  // what a tile's largest magnitude is raised to, in [2^-100, 2^100]
  bool power_of_two = false;   // scales rounded up to powers of two
};

/// 1×128 tiles along rows. data [T, K] contiguous; scales [T, ceil(K / 128)] with strides (1, T
/// rounded up to 4): tokens are contiguous and each tile's column starts at 16 bytes, as DeepGEMM's
/// SM90 kernels read it, and LibTorch's _scaled_mm where T is a multiple of 4.
struct Fp8RowTiles {
  at::Tensor data, scales;
};

/// 128×1 tiles along columns, transposed. data [K, Tp] contiguous, Tp = T rounded up to 128, zeros
/// beyond T; scales [K, Tp / 128] with strides (1, K rounded up to 4).
struct Fp8ColumnTiles {
  at::Tensor data, scales;
};

/// 128×128 blocks. data [N, K] contiguous; scales [ceil(N / 128), ceil(K / 128)] contiguous: a
/// released checkpoint's weight_scale_inv.
struct Fp8BlockTiles {
  at::Tensor data, scales;
};

/// Rows in groups, that leave padded with zeros to multiples of 128 rows each. ends [E] int32 on
/// x's device, ascending, at most T (checked on the host); 1 ≤ E ≤ 1024. The output has
/// padded_group_rows(T, E) rows, whatever the sizes.
struct RowGroups {
  at::Tensor ends;  // undefined = rows stay where they are
};
/// T + 127·E rounded up to 128: the rows that E groups of T rows never exceed.
int64_t padded_group_rows(int64_t num_rows, int64_t num_groups);

/// x [T, K] FP32 or BF16, rows may be strided.
Fp8RowTiles quantize_rows(const at::Tensor& x, const QuantizeOptions& options,
                          const RowGroups& groups = {});
Fp8ColumnTiles quantize_columns(const at::Tensor& x, const QuantizeOptions& options,
                                const RowGroups& groups = {});
/// Both, reading x once.
std::pair<Fp8RowTiles, Fp8ColumnTiles> quantize_both(const at::Tensor& x,
                                                     const QuantizeOptions& options,
                                                     const RowGroups& groups = {});
/// 1×128 → 128×1, from code · scale in FP32.
Fp8ColumnTiles requantize_columns(const Fp8RowTiles& x, const QuantizeOptions& options,
                                  const RowGroups& groups = {});
Fp8BlockTiles quantize_blocks(const at::Tensor& x, const QuantizeOptions& options);

/// code · scale, rounded to `dtype` (FP32 or BF16), contiguous. Columns: the first num_tokens (≤
/// Tp) tokens, [num_tokens, K].
at::Tensor dequantize(const Fp8RowTiles& x, at::ScalarType dtype);
at::Tensor dequantize(const Fp8ColumnTiles& x, at::ScalarType dtype, int64_t num_tokens);
at::Tensor dequantize(const Fp8BlockTiles& x, at::ScalarType dtype);

/// Uninitialised tiles of a [T, K] matrix on x's device, for operators that quantise their output.
Fp8RowTiles empty_row_tiles(int64_t num_tokens, int64_t width, const at::Tensor& like);
Fp8ColumnTiles empty_column_tiles(int64_t num_tokens, int64_t width, const at::Tensor& like);

namespace reference {
// Plain tensors in FP32, any device; the same bits as the bodies.
Fp8RowTiles quantize_rows(const at::Tensor& x, const QuantizeOptions& options,
                          const RowGroups& groups = {});
Fp8ColumnTiles quantize_columns(const at::Tensor& x, const QuantizeOptions& options,
                                const RowGroups& groups = {});
Fp8BlockTiles quantize_blocks(const at::Tensor& x, const QuantizeOptions& options);
at::Tensor dequantize(const Fp8RowTiles& x, at::ScalarType dtype);
at::Tensor dequantize(const Fp8ColumnTiles& x, at::ScalarType dtype, int64_t num_tokens);
at::Tensor dequantize(const Fp8BlockTiles& x, at::ScalarType dtype);
}  // namespace reference

}  // namespace dsv3::ops
