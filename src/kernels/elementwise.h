#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/kernel.h"
#include "kernels/quantize.h"

// Row-by-row work that is bound by memory: norm, SwiGLU, the embedding table. Letters: T tokens, D
// hidden, I intermediate, V vocabulary. Every dtype is kF32 or kBF16, arithmetic is FP32. A stride
// counts elements from one row to the next; the last dim is contiguous. All functions throw
// std::invalid_argument on another dtype, CudaError on a failed launch; T = 0 is allowed.

namespace dsv3::kernels {

/// s = x (+ residual); y[t] = s[t] · inv_rms[t] · weight, inv_rms[t] = 1 / sqrt(mean(s[t]²) + eps).
/// Zhang & Sennrich 2019, arXiv:1910.07467. Reads T·D (twice with residual), writes T·D (twice).
/// Note: with a residual the norm sees s as it was rounded into `sum`, so that backward agrees.
/// Options: a second norm of the same s with its own weight; y in FP8 besides or instead of y,
/// quantised from y as rounded to `dtype`, so that it has the bits of rms_norm and quantize_tiles
/// in turn.
struct RmsNormForward {
  int64_t num_tokens;                   // T
  int64_t hidden;                       // D
  int64_t x_stride;                     // of x's rows
  float eps;                            // added to the mean of squares
  DType dtype;                          // of x, residual, weights, sum, y
  const void* x;                        // [T, D], rows x_stride apart
  const void* residual;                 // [T, D] contiguous, may be null
  const void* weight;                   // [D]
  void* sum;                            // [T, D] contiguous, given exactly when residual is
  void* y;                              // [T, D] contiguous; may be null with `quantized`
  float* inv_rms;                       // [T], saved for backward; may be null
  bool inv_rms_given = false;           // inv_rms is what an earlier call made, and is only read
  const void* second_weight = nullptr;  // [D], may be null
  void* second_y = nullptr;             // [T, D] contiguous, given exactly when second_weight is
  ScaleRule rule = {};                  // of `quantized`
  Fp8Rows quantized = {};               // y in 1×128 tiles, may be empty
};

/// With x̂ = x · inv_rms and g = dy·weight (+ second_dy·second_weight): dx[t] = dsum[t] +
/// inv_rms · (g - x̂ · mean(g·x̂)), and dweight += Σ_t dy[t] · x̂[t] (second_dweight likewise), summed
/// in FP32 in an order that depends on T and D only.
struct RmsNormBackward {
  int64_t num_tokens;    // T
  int64_t hidden;        // D
  int64_t x_stride;      // of x's rows
  DType dtype;           // of dy, x, weight, dsum, dx
  const void* dy;        // [T, D] contiguous
  const void* x;         // [T, D], rows x_stride apart: what was normalised
  const void* weight;    // [D]
  const float* inv_rms;  // [T]
  const void* dsum;      // [T, D] contiguous, may be null: gradient of `sum` that joins dx
  void* dx;              // [T, D] contiguous
  void* dweight;         // [D], ADDED to; may be null
  DType dweight_dtype;   // kF32 or kBF16
  float* scratch;  // rms_norm_backward_scratch() floats, uninitialised; unused without dweights
  const void* second_dy = nullptr;      // [T, D] contiguous, may be null: one norm only
  const void* second_weight = nullptr;  // [D], given exactly when second_dy is
  void* second_dweight = nullptr;       // [D] of dweight_dtype, ADDED to; may be null
};
int64_t rms_norm_backward_scratch(int64_t num_tokens, int64_t hidden, bool second = false);

/// y[t] = silu(gate[t]) · up[t] · row_weight[t], gate_up[t] = [gate | up], silu(g) = g / (1 +
/// e^-g). FP8 forms are quantised from y as rounded to `dtype`, besides or instead of y; gate_up is
/// read once.
struct SwigluForward {
  int64_t num_tokens;                 // T
  int64_t intermediate;               // I
  DType dtype;                        // of gate_up, y
  const void* gate_up;                // [T, 2I] contiguous
  void* y;                            // [T, I] contiguous; may be null with an FP8 form
  const float* row_weight = nullptr;  // [T], null = 1: the routing weight of an expert's row
  ScaleRule rule = {};                // of the FP8 forms
  Fp8Rows rows = {};                  // y [T, I] in 1×128 tiles, may be empty
  Fp8Columns columns = {};            // yᵀ [I, Tp] in 128×1 tiles, may be empty
};

/// With d = dy · row_weight: dgate = d · up · σ(g) · (1 + g · (1 - σ(g))), dup = d · silu(g);
/// drow_weight[t] = Σ_i dy · silu(gate) · up, summed in FP32 in a fixed order. FP8 forms as above.
struct SwigluBackward {
  int64_t num_tokens;
  int64_t intermediate;
  DType dtype;          // of dy, gate_up, dgate_up
  const void* dy;       // [T, I] contiguous
  const void* gate_up;  // [T, 2I] contiguous
  void* dgate_up;       // [T, 2I] contiguous; may be gate_up itself; may be null with an FP8 form
  const float* row_weight = nullptr;  // [T], as in forward
  float* drow_weight = nullptr;       // [T], may be null
  float* scratch = nullptr;           // swiglu_backward_scratch() floats, with an FP8 form
  ScaleRule rule = {};
  Fp8Rows rows = {};        // dgate_up [T, 2I] in 1×128 tiles, may be empty
  Fp8Columns columns = {};  // its transpose [2I, Tp] in 128×1 tiles, may be empty
};
/// A row's shares of drow_weight, one for each 128 columns, and a count of the tiles given out.
int64_t swiglu_backward_scratch(int64_t num_tokens, int64_t intermediate);

/// y[t] = table[ids[t]].
struct EmbeddingForward {
  int64_t num_tokens;  // T
  int64_t vocab;       // V
  int64_t hidden;      // D
  DType dtype;         // of table, y
  const int32_t* ids;  // [T] in [0, V): std::invalid_argument on the host, zeros on CUDA otherwise
  const void* table;   // [V, D]
  void* y;             // [T, D]
};

/// dtable[v] += Σ over the tokens with id v of dy[t], summed in FP32 in an order that depends on
/// the ids only (the host: token order) and added once. Reads T·D, updates the rows that occur.
struct EmbeddingBackward {
  int64_t num_tokens;  // T < 2³¹
  int64_t vocab;       // V
  int64_t hidden;      // D
  DType dtype;         // of dy
  DType dtable_dtype;  // kF32 or kBF16
  const int32_t* ids;  // [T] in [0, V)
  const void* dy;      // [T, D] contiguous
  void* dtable;        // [V, D], ADDED to
  void* scratch;       // embedding_backward_scratch() bytes, 16-byte aligned, uninitialised
};
/// Bytes; asks the device how its sort is sized when `cuda`.
int64_t embedding_backward_scratch(int64_t num_tokens, int64_t vocab, int64_t hidden, bool cuda);

DSV3_DECLARE_KERNEL(rms_norm_forward, RmsNormForward)
DSV3_DECLARE_KERNEL(rms_norm_backward, RmsNormBackward)
DSV3_DECLARE_KERNEL(swiglu_forward, SwigluForward)
DSV3_DECLARE_KERNEL(swiglu_backward, SwigluBackward)
DSV3_DECLARE_KERNEL(embedding_forward, EmbeddingForward)
DSV3_DECLARE_KERNEL(embedding_backward, EmbeddingBackward)

namespace cuda {
int64_t embedding_backward_scratch(int64_t num_tokens, int64_t vocab, int64_t hidden);
}  // namespace cuda

}  // namespace dsv3::kernels
