#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/kernel.h"

// Row-by-row work that is bound by memory: norm, SwiGLU, the embedding table. Letters: T tokens, D
// hidden, I intermediate, V vocabulary. Every dtype is kF32 or kBF16, arithmetic is FP32. A stride
// counts elements from one row to the next; the last dim is contiguous. All functions throw
// std::invalid_argument on another dtype, CudaError on a failed launch; T = 0 is allowed.

namespace dsv3::kernels {

/// s = x (+ residual); y[t] = s[t] · inv_rms[t] · weight, inv_rms[t] = 1 / sqrt(mean(s[t]²) + eps).
/// Zhang & Sennrich 2019, arXiv:1910.07467. Reads T·D (twice with residual), writes T·D (twice).
/// Note: with a residual the norm sees s as it was rounded into `sum`, so that backward agrees.
struct RmsNormForward {
  int64_t num_tokens;    // T
  int64_t hidden;        // D
  int64_t x_stride;      // of x's rows
  float eps;             // added to the mean of squares
  DType dtype;           // of x, residual, weight, sum, y
  const void* x;         // [T, D], rows x_stride apart
  const void* residual;  // [T, D] contiguous, may be null
  const void* weight;    // [D]
  void* sum;             // [T, D] contiguous, given exactly when residual is
  void* y;               // [T, D] contiguous
  float* inv_rms;        // [T], saved for backward; may be null
};

/// With x̂ = x · inv_rms: dx[t] = dsum[t] + inv_rms · (dy·weight - x̂ · mean(dy·weight·x̂)), and
/// dweight += Σ_t dy[t] · x̂[t], summed in FP32 in an order that depends on T and D only.
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
  float* scratch;  // rms_norm_backward_scratch() floats, uninitialised; unused without dweight
};
int64_t rms_norm_backward_scratch(int64_t num_tokens, int64_t hidden);

/// y[t] = silu(gate[t]) · up[t], gate_up[t] = [gate | up], silu(g) = g / (1 + e^-g).
struct SwigluForward {
  int64_t num_tokens;    // T
  int64_t intermediate;  // I
  DType dtype;           // of gate_up, y
  const void* gate_up;   // [T, 2I] contiguous
  void* y;               // [T, I] contiguous
};

/// dgate = dy · up · σ(g) · (1 + g · (1 - σ(g))), dup = dy · silu(g).
struct SwigluBackward {
  int64_t num_tokens;
  int64_t intermediate;
  DType dtype;          // of dy, gate_up, dgate_up
  const void* dy;       // [T, I] contiguous
  const void* gate_up;  // [T, 2I] contiguous
  void* dgate_up;       // [T, 2I] contiguous; may be gate_up itself
};

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
