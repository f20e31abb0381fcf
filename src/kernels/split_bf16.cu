// FP32 as a sum of BF16 terms, a thread per 4 neighbouring elements of a row (1 where rows are not
// aligned). Bytes moved: 4 in and 2 out per term: memory bound; V3's gate weight in three terms is
// 18 MB.

#include <cuda_bf16.h>

#include "kernels/detail/launch.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/routing.h"

namespace dsv3::kernels::cuda {
namespace {

constexpr int kThreads = 256;

/// Turns the rest of x into its next term and takes that from the rest.
__device__ __forceinline__ __nv_bfloat16 next_term(float& rest) {
  const __nv_bfloat16 term = __float2bfloat16_rn(rest);
  rest -= __bfloat162float(term);
  return term;
}

template <int kWidth>
struct alignas(kWidth * sizeof(__nv_bfloat16)) Terms {
  __nv_bfloat16 values[kWidth];
};

template <int kWidth>
__global__ void __launch_bounds__(kThreads) split_kernel(SplitBf16 p) {
  const int64_t per_row = p.num_columns / kWidth;
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= p.num_rows * per_row) return;
  const int64_t row = item / per_row, column = item % per_row * kWidth;
  float rest[kWidth];
  const float* const x = p.x + row * p.num_columns + column;
  if constexpr (kWidth == 4) {
    const float4 four = *reinterpret_cast<const float4*>(x);
    rest[0] = four.x, rest[1] = four.y, rest[2] = four.z, rest[3] = four.w;
  } else {
    rest[0] = *x;
  }
  Terms<kWidth> terms[3];
#pragma unroll
  for (int j = 0; j < 3; ++j) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) terms[j].values[i] = next_term(rest[i]);
  }
  auto* const y = static_cast<__nv_bfloat16*>(p.y) + row * p.row_stride + column;
#pragma unroll
  for (int i = 0; i < kMaxSplitTerms; ++i) {
    if (i >= p.num_terms) break;
    const int term = p.terms[i];
    *reinterpret_cast<Terms<kWidth>*>(y + i * p.term_stride) = term == 0   ? terms[0]
                                                               : term == 1 ? terms[1]
                                                                           : terms[2];
  }
}

}  // namespace

void split_bf16(const SplitBf16& p, Stream stream) {
  check_split_bf16(p);
  if (p.num_rows == 0 || p.num_columns == 0) return;
  const bool wide = p.num_columns % 4 == 0 && p.row_stride % 4 == 0 && p.term_stride % 4 == 0 &&
                    detail::aligned16(p.x) && detail::aligned16(p.y);
  const int64_t items = p.num_rows * p.num_columns / (wide ? 4 : 1);
  auto* const kernel = wide ? split_kernel<4> : split_kernel<1>;
  kernel<<<static_cast<unsigned>((items + kThreads - 1) / kThreads), kThreads, 0,
           detail::cuda_stream(stream)>>>(p);
  detail::check_launch("split_bf16");
}

}  // namespace dsv3::kernels::cuda
