#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/kernel.h"
#include "kernels/quantize.h"

namespace dsv3::kernels {

/// One AdamW step over a flat range, in FP32 (Loshchilov & Hutter 2019, arXiv:1711.05101; the
/// formula of torch.optim.AdamW), with g = gradient · gradient_scale:
///   w -= lr · decay · w
///   m = β1 m + (1 - β1) g,   v = β2 v + (1 - β2) g²
///   w -= lr / correction1 · m / (sqrt(v / correction2) + eps)
///   ema = ema_decay · ema + (1 - ema_decay) · w
/// One pass over memory: 28 bytes an element for FP32, 14–30 for BF16 weights, and what zeroed
/// gradients (one write) and the EMA (a read and a write) add. When `partials` is given, how far
/// the weights moved is summed on the way.
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
  double beta1, beta2;  // FP64: 1 - β of a rounded β would err in its sixth digit
  float eps;
  float weight_decay;  // of elements [0, decay_end); the rest (norms and the like) has none
  float correction1;   // 1 - β1^step, step counted from 1
  float correction2;   // 1 - β2^step
  const float* gradient_scale;         // [1] on the device (the clip factor), may be null (= 1)
  const int32_t* skip;                 // [1] on the device, may be null; non-zero: no update
  bool zero_gradients;                 // zero them in the same pass, also when skipped
  const float* corrections = nullptr;  // [2] on the device: in place of correction1, correction2
  int64_t decay_end = INT64_MAX;
  void* ema = nullptr;  // [size], may be null: a running mean of the weights
  DType ema_dtype = DType::kF32;
  double ema_decay = 0.0;
  /// BF16 weights without a master and BF16 moments are rounded up or down at random, with the
  /// probabilities that keep the mean, instead of to nearest. The random bits of element i are a
  /// function of (seed, step, first_index + i) only, whatever the device and the cut into ranges.
  /// Note: on CUDA a range is fast when first_index is a multiple of 8.
  bool stochastic_rounding = false;
  uint64_t seed = 0;
  uint64_t step = 0;
  int64_t first_index = 0;     // of element 0 among all elements of the run, ≥ 0
  double* partials = nullptr;  // [adamw_partials(size), 2], may be null: parts of Σ (w after - w
                               // before)² and of Σ (w before)², before w after is rounded to BF16;
                               // zeros when skipped. adamw_fp8 does not fill it
};

/// Elements of a part of how far the weights moved.
inline constexpr int64_t kAdamWPart = 2048;

/// Parts that one pass leaves, a pure function of the range's size: adding them in order gives the
/// same bits on every run.
constexpr int64_t adamw_partials(int64_t size) {
  return (size + kAdamWPart - 1) / kAdamWPart;
}

/// AdamW over a matrix [rows, columns] of a flat range, whose new weights (the master where there
/// is one) are also written as E4M3 in 128×128 blocks, by the rules of kernels/quantize.h: the bits
/// of adamw and quantize_blocks in turn. A block of threads keeps a whole block of weights on chip
/// between its update and its quantisation: memory is passed once.
struct AdamWFp8 {
  AdamW update;  // of rows · columns elements; `weights` may be null beside a master
  int64_t rows;
  int64_t columns;
  uint8_t* codes;        // [rows, columns] contiguous
  float* scales;         // block (i, j) at i · scale_stride + j: value = code · scale
  int64_t scale_stride;  // ≥ ceil(columns / 128)
  ScaleRule rule;
};

/// result[0] = Σ x², by partial sums in a fixed order: the same bits on every run. A few squares at
/// a time in FP32 (|x| from 2^64 on gives infinity, as LibTorch's norm does), their sums in FP64.
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

/// Whether an optimizer step is taken, decided where the numbers are, and the count of those that
/// were: skip = kSkipNotFinite when it was set or one of the losses is NaN or infinite, else
/// kSkipSpike when losses[0] · loss_scale > loss_limit, else 0; updates += (skip == 0);
/// corrections = 1 - β^max(updates, 1). All inputs are those of the whole global batch, so that all
/// ranks decide alike.
struct DecideStep {
  int32_t num_losses;    // may be 0
  const double* losses;  // [num_losses]
  double loss_scale;     // losses[0] · loss_scale is the loss per token
  double loss_limit;     // infinity: no limit
  double beta1, beta2;
  int64_t* updates;    // [1] in and out
  float* corrections;  // [2] AdamW's
  int32_t* skip;       // [1] in: not_finite of the gradient norm; out: AdamW's
};
inline constexpr int32_t kSkipNotFinite = 1, kSkipSpike = 2;

/// Where a flat buffer of ranges holds NaN or infinity: counts[r] += how many range r holds,
/// first[r] = min(first[r], index of the first of them from the range's start). A range ends where
/// the next begins. Reads nothing while *only_if is 0, so that it can stand in every step.
struct LocateNonFinite {
  int64_t size;            // elements of the buffer
  DType dtype;             // kF32 or kBF16
  const void* x;           // [size]
  int64_t num_ranges;      // at least 1
  const int64_t* starts;   // [num_ranges] ascending multiples of kNonFiniteTile; the first is 0
  const int32_t* only_if;  // [1], may be null: always
  int64_t* counts;         // [num_ranges]
  int64_t* first;          // [num_ranges]
};
inline constexpr int64_t kNonFiniteTile = 128;

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
DSV3_DECLARE_KERNEL(adamw_fp8, AdamWFp8)
DSV3_DECLARE_KERNEL(sum_of_squares, SumOfSquares)
DSV3_DECLARE_KERNEL(finish_norm, FinishNorm)
DSV3_DECLARE_KERNEL(decide_step, DecideStep)
DSV3_DECLARE_KERNEL(locate_non_finite, LocateNonFinite)
DSV3_DECLARE_KERNEL(normal_fill, NormalFill)

}  // namespace dsv3::kernels
