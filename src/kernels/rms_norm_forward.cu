// RMSNorm's forward on the device: a group of 16 … 1024 threads holds a row in registers (up to 32
// elements a thread), all loads of x and residual in flight before the first use, so each row is
// read once and written once: 4·T·D bytes in BF16, 8·T·D with a residual, 3·T·D where only FP8
// leaves (a tile of 128 is 16 neighbouring lanes). Widths that are not multiples of 8, unaligned
// pointers and D > 32768 take a scalar path. Backward: rms_norm.cu.

#include "kernels/detail/fp8_row.cuh"
#include "kernels/detail/row_groups.cuh"
#include "kernels/elementwise.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;
using detail::kWarp;
using detail::Packed;

constexpr int kScalarThreads = 256;
/// Rows of up to so many vectors of eight elements have four of them a thread; so have FP8's, for
/// its tiles, and those that are too wide. The others have two and twice as many threads, which
/// keeps less waiting for a row's sum (1 to 3 % on an H200). The sum has the same bits either way.
constexpr int64_t kNarrow = 64;
constexpr int kSmallBlock = 128;  // threads that several rows share

/// Blocks of a multiprocessor, 0 = as the compiler likes: 16,384 latents of 512 columns, 10 us,
/// fill a device once if two more registers do not forbid it.
template <typename T, typename Rows, bool kMore>
inline constexpr int kBlocks = sizeof(T) == 2 && Rows::kGroup == 16 && !kMore ? 8 : 0;

/// kVectors: a thread's, 2 or 4. kExtra: a second norm, FP8, or both. kFull: every vector of every
/// thread exists, which saves the questions; only FP8, bound by its instructions, is the faster for
/// it.
template <typename T, typename Rows, int kVectors, bool kResidual, bool kExtra, bool kFull>
__global__ void __launch_bounds__(Rows::kThreads, kBlocks<T, Rows, kResidual || kExtra>)
    forward_kernel(RmsNormForward p) {
  __shared__ float shared[kVectors / 2 * Rows::kThreads / kWarp];
  constexpr int kGroup = Rows::kGroup;
  const int lane = threadIdx.x % kGroup;
  const int64_t row = int64_t{blockIdx.x} * Rows::kRows + threadIdx.x / kGroup;
  const bool active = kFull || row < p.num_tokens;
  int vectors = active ? static_cast<int>(p.hidden / kVector) : 0;
  if constexpr (kFull) vectors = kVectors * kGroup;
  // Calls fn(i, offset from the row's begin) for the vectors of this thread that exist.
  const auto each = [&](auto&& fn) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (lane + i * kGroup < vectors) fn(i, (lane + i * kGroup) * kVector);
    }
  };
  Packed<T> v[kVectors], other[kVectors];  // other: the residual, then y
#pragma unroll
  for (int i = 0; i < kVectors; ++i) v[i].clear(), other[i].clear();
  each([&](int i, int d) {
    v[i].load(static_cast<const T*>(p.x) + row * p.x_stride + d);
    if constexpr (kResidual) {
      other[i].load(static_cast<const T*>(p.residual) + row * p.hidden + d);
    }
  });
  if constexpr (kResidual) {
    each([&](int i, int d) {
      float sum[kVector];
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum[e] = v[i].at(e) + other[i].at(e);
      v[i].set(sum);
      v[i].store(static_cast<T*>(p.sum) + row * p.hidden + d);
    });
  }
  float inv_rms = 0.0f;
  if (p.inv_rms_given) {
    if (active) inv_rms = p.inv_rms[row];
  } else {
    float squares[kVectors / 2] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float& sum = squares[i % (kVectors / 2)];
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum = fmaf(v[i].at(e), v[i].at(e), sum);
    }
    float total;
    if constexpr (kVectors == 2) {
      total = detail::row_sum<Rows>(squares[0], shared);
    } else {
      total = detail::row_sum_of_two<Rows>(squares[0], squares[1], shared);
    }
    inv_rms = rsqrtf(total / static_cast<float>(p.hidden) + p.eps);
    if (active && lane == 0 && p.inv_rms != nullptr) p.inv_rms[row] = inv_rms;
  }
  const auto normalise = [&](const void* weight, void* y) {
    each([&](int i, int d) {
      Packed<T> w;
      w.load(static_cast<const T*>(weight) + d);
      float out[kVector];
#pragma unroll
      for (int e = 0; e < kVector; ++e) out[e] = v[i].at(e) * (inv_rms * w.at(e));
      other[i].set(out);
      if (y != nullptr) other[i].store(static_cast<T*>(y) + row * p.hidden + d);
    });
  };
  if (kExtra && p.second_weight != nullptr) normalise(p.second_weight, p.second_y);
  normalise(p.weight, p.y);
  if constexpr (kExtra && kVectors == 4) {
    if (p.quantized.data == nullptr) return;
    detail::write_row<kGroup>(p.quantized, p.rule, other, row, p.hidden, lane, vectors);
  }
}

/// One row's FP8 form by a block: a warp per tile, 4 elements a lane.
template <typename T>
__device__ void quantize_row(const RmsNormForward& p, const T* x, float inv_rms, int64_t row) {
  const int lane = threadIdx.x % kWarp;
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t tile = threadIdx.x / kWarp; tile * kFp8Tile < p.hidden;
       tile += kScalarThreads / kWarp) {
    float v[4], amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t d = tile * kFp8Tile + lane + i * kWarp;
      v[i] = 0.0f;
      if (d < p.hidden) {
        const float y = detail::to_float(x[d]) * (inv_rms * detail::to_float(weight[d]));
        v[i] = detail::to_float(detail::from_float<T>(y));
      }
      amax = fmaxf(amax, fabsf(v[i]));
    }
    const auto scale = kernels::detail::tile_scale(detail::warp_max(amax), p.rule);
    if (lane == 0) p.quantized.scales[tile * p.quantized.scale_stride + row] = scale.scale;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t d = tile * kFp8Tile + lane + i * kWarp;
      const uint32_t code = detail::encode4(__fmul_rn(v[i], scale.inverse), 0.0f, 0.0f, 0.0f);
      if (d < p.hidden) p.quantized.data[row * p.hidden + d] = static_cast<uint8_t>(code);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kScalarThreads) forward_scalar_kernel(RmsNormForward p) {
  __shared__ float shared[kScalarThreads / kWarp];
  const int64_t row = blockIdx.x;
  const T* normalised = static_cast<const T*>(p.x) + row * p.x_stride;
  if (p.residual != nullptr) {
    const T* residual = static_cast<const T*>(p.residual) + row * p.hidden;
    T* sum = static_cast<T*>(p.sum) + row * p.hidden;
    for (int64_t d = threadIdx.x; d < p.hidden; d += kScalarThreads) {
      sum[d] =
          detail::from_float<T>(detail::to_float(normalised[d]) + detail::to_float(residual[d]));
    }
    __syncthreads();
    normalised = sum;
  }
  float squares = 0.0f;
  for (int64_t d = threadIdx.x; d < p.hidden; d += kScalarThreads) {
    const float v = detail::to_float(normalised[d]);
    squares = fmaf(v, v, squares);
  }
  squares = detail::row_sum<detail::RowGroups<kScalarThreads>>(squares, shared);
  float inv_rms = rsqrtf(squares / static_cast<float>(p.hidden) + p.eps);
  if (p.inv_rms_given) inv_rms = p.inv_rms[row];
  if (threadIdx.x == 0 && p.inv_rms != nullptr && !p.inv_rms_given) p.inv_rms[row] = inv_rms;
  const auto write = [&](const void* weight, void* y) {
    if (y == nullptr) return;
    for (int64_t d = threadIdx.x; d < p.hidden; d += kScalarThreads) {
      const float w = detail::to_float(static_cast<const T*>(weight)[d]);
      static_cast<T*>(y)[row * p.hidden + d] =
          detail::from_float<T>(detail::to_float(normalised[d]) * (inv_rms * w));
    }
  };
  write(p.weight, p.y);
  write(p.second_weight, p.second_y);
  if (p.quantized.data != nullptr) quantize_row(p, normalised, inv_rms, row);
}

template <typename T, typename Rows, int kVectors, bool kExtra>
void launch_rows(const RmsNormForward& p, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>((p.num_tokens + Rows::kRows - 1) / Rows::kRows);
  const auto launch = [&](auto residual, auto full) {
    forward_kernel<T, Rows, kVectors, decltype(residual)::value, kExtra, decltype(full)::value>
        <<<grid, Rows::kThreads, 0, stream>>>(p);
  };
  constexpr int64_t kWidth = int64_t{kVectors} * kVector * Rows::kGroup;
  const bool full = p.hidden == kWidth && p.num_tokens % Rows::kRows == 0;
  using Full = std::bool_constant<kExtra && kVectors == 4>;
  if (p.residual != nullptr) {
    full ? launch(std::true_type(), Full()) : launch(std::true_type(), std::false_type());
  } else {
    full ? launch(std::false_type(), Full()) : launch(std::false_type(), std::false_type());
  }
}

template <typename T, bool kExtra>
bool launch_vectorised(const RmsNormForward& p, cudaStream_t stream) {
  const int64_t vectors = p.hidden / kVector;
  return detail::dispatch_rows(vectors, 4, [&](auto rows) {
    constexpr int kGroup = decltype(rows)::kGroup;
    if constexpr (2 * kGroup <= 1024) {
      if (vectors > kNarrow && p.quantized.data == nullptr) {
        launch_rows<T, detail::RowGroups<2 * kGroup, kSmallBlock>, 2, kExtra>(p, stream);
        return;
      }
    }
    launch_rows<T, decltype(rows), 4, kExtra>(p, stream);
  });
}

}  // namespace

void rms_norm_forward(const RmsNormForward& p, Stream stream) {
  if (p.num_tokens == 0) return;
  const cudaStream_t on = detail::cuda_stream(stream);
  bool vectorised = p.hidden % kVector == 0 && p.x_stride % kVector == 0;
  for (const void* pointer :
       {p.x, p.residual, p.weight, p.second_weight, static_cast<const void*>(p.sum),
        static_cast<const void*>(p.y), static_cast<const void*>(p.second_y),
        static_cast<const void*>(p.quantized.data)}) {
    vectorised = vectorised && detail::aligned16(pointer);
  }
  const bool extra = p.second_weight != nullptr || p.quantized.data != nullptr;
  detail::dispatch_float("rms_norm", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool done = vectorised && (extra ? launch_vectorised<T, true>(p, on)
                                           : launch_vectorised<T, false>(p, on));
    if (!done) {
      forward_scalar_kernel<T><<<static_cast<unsigned>(p.num_tokens), kScalarThreads, 0, on>>>(p);
    }
  });
  detail::check_launch("rms_norm");
}

}  // namespace dsv3::kernels::cuda
