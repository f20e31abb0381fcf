#pragma once

#include <ATen/core/Tensor.h>

#include "ops/quantize.h"

namespace dsv3::ops {

/// Puts T tokens into a paged latent cache, in place: latent [T, C] (normalised c_kv) and rope [T,
/// R] (the rotated shared key), FP32 or BF16, rows may be strided; slots [T] int32, block ·
/// block_size + offset, none twice; a slot outside the cache (-1) writes nothing. The cache's dtype
/// chooses: BF16 [num_blocks, block_size, C + R]: [latent | rope]; uint8 [num_blocks, block_size, C
/// + 4·C/128 + 2·R]: FlashMLA's FP8 token, C codes in tiles of 128, their FP32 scales, rope in BF16
/// (656 bytes at C = 512, R = 64). The cache is contiguous.
void latent_cache_write(const at::Tensor& latent, const at::Tensor& rope, const at::Tensor& slots,
                        const at::Tensor& cache, const QuantizeOptions& options = {});

namespace reference {
void latent_cache_write(const at::Tensor& latent, const at::Tensor& rope, const at::Tensor& slots,
                        const at::Tensor& cache, const QuantizeOptions& options = {});
}  // namespace reference

}  // namespace dsv3::ops
