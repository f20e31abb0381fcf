// The paged latent cache's write on the device: reads 2·(C + R) bytes per token in BF16 and writes
// a slot. A BF16 slot is one row of words, and threads stand along the rows of all tokens; an FP8
// slot is written by a warp, 8 numbers a lane at a time, a tile of 128 by 16 neighbouring lanes.

#include "kernels/detail/fp8_tile.cuh"
#include "kernels/detail/words.cuh"

namespace dsv3::kernels::cuda {
namespace {

using detail::kWarp;

constexpr int kTokens = 8;  // warps of a block

template <bool kVec, typename T>
__device__ __forceinline__ void load_part(const T* x, int64_t left, float (&v)[8]) {
  if constexpr (kVec) {
    detail::load8(x, v);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = e < left ? detail::to_float(x[e]) : 0.0f;
  }
}

/// `size` numbers in BF16.
template <bool kVec, typename T>
__device__ __forceinline__ void write_bf16(const T* x, int64_t size, uint8_t* out, int lane) {
  auto* y = reinterpret_cast<__nv_bfloat16*>(out);
  for (int64_t c = 8 * lane; c < size; c += 8 * kWarp) {
    float v[8];
    load_part<kVec>(x + c, size - c, v);
    if constexpr (kVec) {
      detail::store8(y + c, v);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (c + e < size) y[c + e] = __float2bfloat16_rn(v[e]);
      }
    }
  }
}

constexpr int kWordThreads = 256, kUnits = 4;  // of a block; words of a thread, in flight together

/// BF16 slots: word w of a token is 8 numbers of [latent | rope]; there are below 2^32 of them.
template <typename T>
__global__ void __launch_bounds__(kWordThreads)
    write_words_kernel(LatentCacheWrite p, unsigned words, unsigned rope_words) {
  const unsigned first = blockIdx.x * (kWordThreads * kUnits) + threadIdx.x;
  const unsigned latent_words = words - rope_words;
  detail::Words8<T> unit[kUnits];
  int64_t to[kUnits];
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    const unsigned at = first + j * kWordThreads, t = at / words, w = at - t * words;
    to[j] = -1;
    if (t >= p.num_tokens) continue;
    const bool is_rope = w >= latent_words;
    const auto* const part = static_cast<const T*>(is_rope ? p.rope : p.latent);
    unit[j].load(part + t * (is_rope ? p.rope_stride : p.latent_stride) +
                 (is_rope ? w - latent_words : w) * detail::kVector);
    const int64_t slot = p.slots[t];
    if (slot >= 0 && slot < p.num_slots) to[j] = slot * words + w;
  }
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    if (to[j] < 0) continue;
    auto* const slot = static_cast<__nv_bfloat16*>(p.cache) + to[j] * detail::kVector;
    if constexpr (sizeof(T) == 2) {
      unit[j].store(slot);
    } else {
      float v[detail::kVector];
      detail::unpack(unit[j], v);
      detail::store8(slot, v);
    }
  }
}

template <typename T, bool kVec>
__global__ void __launch_bounds__(kTokens* kWarp) write_kernel(LatentCacheWrite p, int64_t bytes) {
  const int lane = threadIdx.x % kWarp;
  const int64_t t = int64_t{blockIdx.x} * kTokens + threadIdx.x / kWarp;
  if (t >= p.num_tokens) return;
  const int64_t slot = p.slots[t];
  if (slot < 0 || slot >= p.num_slots) return;
  const T* latent = static_cast<const T*>(p.latent) + t * p.latent_stride;
  const T* rope = static_cast<const T*>(p.rope) + t * p.rope_stride;
  uint8_t* out = static_cast<uint8_t*>(p.cache) + slot * bytes;
  if (p.cache_dtype == DType::kBF16) {
    write_bf16<kVec>(latent, p.latent_dim, out, lane);
    write_bf16<kVec>(rope, p.rope_dim, out + 2 * p.latent_dim, lane);
    return;
  }
  auto* scales = reinterpret_cast<float*>(out + p.latent_dim);
  // Whole warps go round together, because of the shuffles; C is a multiple of 128.
  for (int64_t base = 0; base < p.latent_dim; base += 8 * kWarp) {
    const int64_t c = base + 8 * lane;
    float v[8] = {};
    if (c < p.latent_dim) load_part<kVec>(latent + c, 8, v);
    float amax = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) amax = fmaxf(amax, fabsf(v[e]));
    const auto scale = kernels::detail::tile_scale(detail::half_warp_max(amax), p.rule);
    if (c >= p.latent_dim) continue;
    if (c % kFp8Tile == 0) scales[c / kFp8Tile] = scale.scale;
    detail::store_codes<kVec>(out + c, detail::encode8([&](int e) { return v[e]; }, scale.inverse),
                              8);
  }
  write_bf16<kVec>(rope, p.rope_dim, out + bytes - 2 * p.rope_dim, lane);
}

}  // namespace

void latent_cache_write(const LatentCacheWrite& p, Stream stream) {
  if (p.num_tokens == 0) return;
  const int64_t bytes = latent_cache_bytes(p.latent_dim, p.rope_dim, p.cache_dtype);
  const auto grid = static_cast<unsigned>((p.num_tokens + kTokens - 1) / kTokens);
  const bool vec = p.latent_dim % 8 == 0 && p.rope_dim % 8 == 0 && p.latent_stride % 8 == 0 &&
                   p.rope_stride % 8 == 0 && bytes % 16 == 0 && detail::aligned16(p.latent) &&
                   detail::aligned16(p.rope) && detail::aligned16(p.cache);
  const cudaStream_t on = detail::cuda_stream(stream);
  detail::dispatch_float("latent_cache_write", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (vec && p.cache_dtype == DType::kBF16) {
      const auto words = static_cast<unsigned>(bytes / 16);
      const int64_t all = p.num_tokens * words;
      constexpr int64_t kBlockWords = int64_t{kWordThreads} * kUnits;
      if (all > UINT32_MAX - kBlockWords) {
        kernels::detail::raise_invalid("latent_cache_write", "2^32 words of 16 bytes or more");
      }
      const auto blocks = static_cast<unsigned>((all + kBlockWords - 1) / kBlockWords);
      write_words_kernel<T><<<blocks, kWordThreads, 0, on>>>(
          p, words, static_cast<unsigned>(p.rope_dim / detail::kVector));
    } else if (vec) {
      write_kernel<T, true><<<grid, kTokens * kWarp, 0, on>>>(p, bytes);
    } else {
      write_kernel<T, false><<<grid, kTokens * kWarp, 0, on>>>(p, bytes);
    }
  });
  detail::check_launch("latent_cache_write");
}

}  // namespace dsv3::kernels::cuda
