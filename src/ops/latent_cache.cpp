#include "ops/latent_cache.h"

#include <ATen/ops/cat.h>

#include <vector>

#include "base/error.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/fp8.h"

namespace dsv3::ops {
namespace {

constexpr const char* kOp = "latent_cache_write";

void check(const at::Tensor& latent, const at::Tensor& rope, const at::Tensor& slots,
           const at::Tensor& cache) {
  check_shape(latent, kOp, "latent", {-1, -1});
  check_shape(rope, kOp, "rope", {latent.size(0), -1});
  check_like(rope, kOp, "rope", latent, "latent");
  require(has_kernel(latent), "[{}] latent: expected dtype Float or BFloat16, got {}", kOp,
          c10::toString(latent.scalar_type()));
  check_shape(slots, kOp, "slots", {latent.size(0)});
  check_int32(slots, kOp, "slots", latent);
  require(slots.is_contiguous(), "[{}] slots: expected a contiguous tensor", kOp);
  const bool bf16 = cache.defined() && cache.scalar_type() == at::kBFloat16;
  require(bf16 || (cache.defined() && cache.scalar_type() == at::kByte),
          "[{}] cache: expected dtype BFloat16 or Byte, got {}", kOp,
          cache.defined() ? c10::toString(cache.scalar_type()) : "an undefined tensor");
  const int64_t C = latent.size(1), R = rope.size(1);
  require(bf16 || C % kernels::kFp8Tile == 0,
          "[{}] latent: an FP8 cache needs a multiple of 128 columns, got {}", kOp, C);
  require(
      bf16 || R % 2 == 0,
      "[{}] rope: an FP8 cache needs an even number of columns (its scales stand at multiples of "
      "4 bytes), got {}",
      kOp, R);
  const int64_t bytes = kernels::latent_cache_bytes(C, R, bf16 ? DType::kBF16 : DType::kF8E4M3);
  check_shape(cache, kOp, "cache", {-1, -1, bf16 ? C + R : bytes});
  require(cache.is_contiguous() && cache.device() == latent.device(),
          "[{}] cache: expected a contiguous tensor on {}", kOp, latent.device().str());
  require(bf16 || reinterpret_cast<uintptr_t>(cache.const_data_ptr()) % sizeof(float) == 0,
          "[{}] cache: expected memory aligned to 4 bytes", kOp);
}

}  // namespace

void latent_cache_write(const at::Tensor& latent, const at::Tensor& rope, const at::Tensor& slots,
                        const at::Tensor& cache, const QuantizeOptions& options) {
  const NoRecord guard;
  check(latent, rope, slots, cache);
  const at::Tensor c = rows_contiguous(latent), r = rows_contiguous(rope);
  const bool bf16 = cache.scalar_type() == at::kBFloat16;
  kernels::latent_cache_write({.num_tokens = c.size(0),
                               .latent_dim = c.size(1),
                               .rope_dim = r.size(1),
                               .num_slots = cache.size(0) * cache.size(1),
                               .latent_stride = c.stride(0),
                               .rope_stride = r.stride(0),
                               .dtype = dtype_of(c, kOp, "latent"),
                               .latent = c.const_data_ptr(),
                               .rope = r.const_data_ptr(),
                               .slots = slots.const_data_ptr<int32_t>(),
                               .rule = scale_rule(options, kOp),
                               .cache_dtype = bf16 ? DType::kBF16 : DType::kF8E4M3,
                               .cache = cache.mutable_data_ptr()},
                              stream_of(c));
}

namespace reference {

void latent_cache_write(const at::Tensor& latent, const at::Tensor& rope, const at::Tensor& slots,
                        const at::Tensor& cache, const QuantizeOptions& options) {
  const NoRecord guard;
  const at::Tensor last = rope.to(at::kBFloat16).contiguous();
  at::Tensor tokens;
  if (cache.scalar_type() == at::kBFloat16) {
    tokens = at::cat({latent.to(at::kBFloat16), last}, 1);
  } else {
    const Fp8RowTiles tiles = reference::quantize_rows(latent, options);
    tokens = at::cat({tiles.data.view(at::kByte), tiles.scales.contiguous().view(at::kByte),
                      last.view(at::kByte)},
                     1);
  }
  const at::Tensor where = slots.cpu(), flat = cache.flatten(0, 1);
  for (int64_t t = 0; t < where.size(0); ++t) {
    const int64_t slot = where.const_data_ptr<int32_t>()[t];
    if (slot >= 0 && slot < flat.size(0)) flat.select(0, slot).copy_(tokens.select(0, t));
  }
}

}  // namespace reference
}  // namespace dsv3::ops
