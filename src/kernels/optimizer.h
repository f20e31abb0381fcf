#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/kernel.h"

namespace dsv3::kernels {

/// One AdamW step over a flat range, in FP32 (Loshchilov & Hutter 2019, arXiv:1711.05101; the
/// formula of torch.optim.AdamW), with g = gradient · gradient_scale:
///   w -= lr · decay · w
///   m = β1 m + (1 - β1) g,   v = β2 v + (1 - β2) g²
///   w -= lr / correction1 · m / (sqrt(v / correction2) + eps)
/// and, when `partials` is given, how far the weights moved.
/// One pass over memory: 28 bytes an element for FP32, 14–30 for BF16 weights.
struct AdamW {
  int64_t size;          // elements of the range
  DType weight_dtype;    // kF32 or kBF16
  DType gradient_dtype;  // kF32 or kBF16
  DType moment_dtype;    // kF32 or kBF16
  void* weights;         // [size]; with a master, its rounding
  float* master;         // [size], may be null; only beside kBF16 weights
  void* gradients;       // [size]; written only when zero_gradients
  void* exp_avg;         // [size] m
  void* exp_avg_sq;      // [size] v
  float learning_rate;
  float beta1, beta2, eps;
  float weight_decay;           // of this range; 0 for norms and the like
  float correction1;            // 1 - β1^step, step counted from 1
  float correction2;            // 1 - β2^step
  const float* gradient_scale;  // [1] on the device (the clip factor), may be null (= 1)
  const int32_t* skip;          // [1] on the device, may be null; non-zero: no update
  bool zero_gradients;          // zero them in the same pass, also when skipped
  double* partials;  // [adamw_partials(size), 2], may be null: parts of Σ (w after - w before)² and
                     // of Σ (w before)², before w is rounded to BF16; zeros when skipped
};

/// Parts that one pass leaves, a pure function of the range's size: adding them in order gives the
/// same bits on every run.
constexpr int64_t adamw_partials(int64_t size) {
  constexpr int64_t kBlock = 2048, kMost = 16384;  // elements of a part at least; parts
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  return blocks < kMost ? blocks : kMost;
}

/// result[0] = Σ x², in FP64, by partial sums in a fixed order: the same bits on every run.
struct SumOfSquares {
  int64_t size;
  DType dtype;       // kF32 or kBF16
  const void* x;     // [size]
  double* partials;  // [kSumOfSquaresPartials] scratch
  double* result;    // [1]
};
inline constexpr int32_t kSumOfSquaresPartials = 1024;

/// norm = sqrt(Σ sums); clip_factor = min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_.
struct FinishNorm {
  int32_t count;        // how many sums
  const double* sums;   // [count]
  float max_norm;       // ≤ 0: no clipping, factor 1
  float* norm;          // [1]
  float* clip_factor;   // [1], may be null
  int32_t* not_finite;  // [1], may be null: 1 for an infinite or NaN norm, else 0: AdamW's skip
};

/// y[r, c] = mean + std · n(first + r · pitch + c): normal number i of (seed, stream), the same on
/// every device to about 1e-6 · std. Philox4x32-10 (Salmon et al. 2011) with key = seed and counter
/// = (i / 4, stream) gives four 32-bit words; Box-Muller over their upper 24 bits makes four
/// normals of them, |n| < 5.8. A shard asks for its own global indices.
struct NormalFill {
  int64_t rows;
  int64_t columns;
  int64_t first;   // global index of y[0, 0], ≥ 0
  int64_t pitch;   // global indices from one row to the next
  int64_t stride;  // elements from one row of y to the next
  uint64_t seed;
  uint64_t stream;  // one per tensor, e.g. a hash of its name
  float mean, std;
  DType dtype;  // of y: kF32 or kBF16
  void* y;      // [rows, columns], rows `stride` apart
};

DSV3_DECLARE_KERNEL(adamw, AdamW)
DSV3_DECLARE_KERNEL(sum_of_squares, SumOfSquares)
DSV3_DECLARE_KERNEL(finish_norm, FinishNorm)
DSV3_DECLARE_KERNEL(normal_fill, NormalFill)

}  // namespace dsv3::kernels
