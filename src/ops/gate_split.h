#pragma once

#include <cstdint>

#include "base/tensor_fwd.h"

// FP32 products with a BF16 operand, on BF16 tensor cores.
//
// An FP32 number is the sum of three BF16 numbers (kernels/routing.h: SplitBf16): hi + mid + lo. A
// product of two BF16 numbers is exact in FP32, so x · W = x · W_hi + x · W_mid + x · W_lo with
// nothing lost but the rounding of sums. Tensor cores cut sums off instead of rounding them: each
// step of 16 loses about 2^-24.5 of the sum so far, always toward zero, which over D = 7168 is
// 1e-5, ten times what an FP32 product errs by. Therefore the hi product, which holds all but 2^-8
// of the value, is summed in parts of kSplitPart along the sum, joined by rounded FP32 additions in
// the products' epilogues: 1.4e-6 by this count.
//
// At T = 16384, D = 7168, E = 256 (V3): 3 x 60 GFLOP, 0.26 ms at 700 TFLOP/s; reading x once is
// 235 MB, 55 us; each join reads and writes logits of 17 MB, which the L2 holds. An FP32 product
// takes 60 GFLOP at about 50 TFLOP/s = 1.2 ms, and widening x moves 1.2 GB more. One kernel of ours
// with all three terms in one accumulator would save the joins, but the instructions that we could
// issue from it without a tensor map (mma.sync) reach some 60 % of the tensor cores: 0.4 ms.
//
// Few experts (3 E ≤ 256) are bound by reading x instead: all terms go through one product
// [T, 3 E], which reads x once per part.

namespace dsv3::ops {

inline constexpr int64_t kSplitPart = 1024;

/// x [T, D] BF16, weight [E, D] FP32 → x · weightᵀ [T, E] FP32.
at::Tensor split_product(const at::Tensor& x, const at::Tensor& weight);

/// dlogits [T, E] FP32 in BF16 terms, as the two gradients read them: [T, 3 E] = hi | hi | mid.
at::Tensor split_gradient(const at::Tensor& dlogits);

/// dx [T, D] BF16 = dlogits · weight from split_gradient's terms: hi·hi + hi·mid + mid·hi, which
/// leaves out 2^-16 of the value, a hundredth of dx's own rounding.
at::Tensor split_product_dx(const at::Tensor& terms, const at::Tensor& weight);

/// grad [E, D] FP32 += dlogitsᵀ · x from split_gradient's terms: hi and mid, which leave out 2^-17
/// of each element of dlogits.
void add_split_product_dweight(const at::Tensor& terms, const at::Tensor& x,
                               const at::Tensor& grad);

}  // namespace dsv3::ops
