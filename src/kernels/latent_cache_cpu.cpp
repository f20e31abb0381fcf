// The paged latent cache's write on the host: threads over tokens.
#include "kernels/detail/fp8_cpu.h"

namespace dsv3::kernels::cpu {
namespace {

template <typename T>
DSV3_INLINE void write_bf16(const T* __restrict x, int64_t size, uint8_t* out) {
  auto* __restrict y = reinterpret_cast<BFloat16*>(out);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) detail::store(&y[i], detail::load(&x[i]));
}

template <typename T>
DSV3_INLINE void write_body(const LatentCacheWrite& p, int64_t begin, int64_t end) {
  const int64_t bytes = latent_cache_bytes(p.latent_dim, p.rope_dim, p.cache_dtype);
  for (int64_t t = begin; t < end; ++t) {
    if (p.slots[t] < 0 || p.slots[t] >= p.num_slots) continue;
    const T* latent = static_cast<const T*>(p.latent) + t * p.latent_stride;
    const T* rope = static_cast<const T*>(p.rope) + t * p.rope_stride;
    uint8_t* slot = static_cast<uint8_t*>(p.cache) + p.slots[t] * bytes;
    if (p.cache_dtype == DType::kBF16) {
      write_bf16(latent, p.latent_dim, slot);
      write_bf16(rope, p.rope_dim, slot + 2 * p.latent_dim);
      continue;
    }
    auto* scales = reinterpret_cast<float*>(slot + p.latent_dim);
    for (int64_t first = 0; first < p.latent_dim; first += kFp8Tile) {
      detail::encode_row_tiles(latent + first, kFp8Tile, p.rule, slot + first, scales++, 1);
    }
    write_bf16(rope, p.rope_dim, slot + bytes - 2 * p.rope_dim);
  }
}

DSV3_CLONES void write_rows(const LatentCacheWrite& p, const float*, int64_t begin, int64_t end) {
  write_body<float>(p, begin, end);
}
DSV3_CLONES void write_rows(const LatentCacheWrite& p, const BFloat16*, int64_t begin,
                            int64_t end) {
  write_body<BFloat16>(p, begin, end);
}

}  // namespace

void latent_cache_write(const LatentCacheWrite& p) {
  const int64_t bytes = (p.latent_dim + p.rope_dim) * (size_of(p.dtype) + 2);
  detail::dispatch_float("latent_cache_write", p.dtype, [&](auto* type) {
    detail::parallel_rows(p.num_tokens, bytes,
                          [&](int64_t begin, int64_t end) { write_rows(p, type, begin, end); });
  });
}

}  // namespace dsv3::kernels::cpu
