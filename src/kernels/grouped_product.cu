// Products over experts in plain arithmetic: correct for every size and type, not fast. 256 threads
// make a 64 × 64 tile of one expert's result, 4 × 4 elements each, from slices of 16 terms in
// shared memory. grouped_product: blocks (columns of y, a worker over the expert's row tiles,
// expert). grouped_weight_grad: blocks (columns, rows of grad, expert), each over all rows of its
// expert. Blocks read the offsets themselves, so the host needs no counts; no atomics, the same
// bits on every run. 2·T'·K·N FLOP without tensor cores: bound by FP32 arithmetic, at a fraction of
// its peak.

#include <algorithm>
#include <type_traits>

#include "kernels/detail/launch.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/products.h"

namespace dsv3::kernels::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kStep = 16;
constexpr int kThreads = 256;
constexpr int kLanes = 16;  // threads along each side of the tile
constexpr int kEach = kTile / kLanes;
static_assert(kLanes * kLanes == kThreads);

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widen(double x) {
  return x;
}
template <typename T>
__device__ __forceinline__ float widen(T x) {
  return detail::to_float(x);
}

template <typename T>
__device__ __forceinline__ T narrow(Sum<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return detail::from_float<T>(x);
  }
}

/// One factor: element (i, k) stands at data[i · stride + k · term_stride].
template <typename T>
struct Factor {
  const T* data;
  int64_t size;  // of i
  int64_t stride;
  int64_t term_stride;
};

template <typename T>
using Slice = Sum<T>[kStep][kTile + 1];  // one column more, against bank conflicts

/// slice[k][i] = factor(first + i, first_term + k), 0 beyond its ends; neighbours in a warp follow
/// whichever index lies contiguous.
template <typename T>
__device__ __forceinline__ void load_slice(const Factor<T>& factor, int64_t first,
                                           int64_t first_term, int64_t num_terms, Slice<T>& slice) {
  const bool along_terms = factor.term_stride == 1;
  for (int j = threadIdx.x; j < kStep * kTile; j += kThreads) {
    const int k = along_terms ? j % kStep : j / kTile;
    const int i = along_terms ? j / kStep : j % kTile;
    const int64_t at = first + i, term = first_term + k;
    slice[k][i] = at < factor.size && term < num_terms
                      ? widen(factor.data[at * factor.stride + term * factor.term_stride])
                      : Sum<T>(0);
  }
}

/// sums[a][b] = Σ_k left(row + lane_row + 16 a, k) · right(column + lane_column + 16 b, k).
template <typename T>
__device__ void multiply(const Factor<T>& left, const Factor<T>& right, int64_t row, int64_t column,
                         int64_t num_terms, Sum<T> (&sums)[kEach][kEach]) {
  __shared__ Slice<T> left_slice, right_slice;
  const int lane_column = threadIdx.x % kLanes, lane_row = threadIdx.x / kLanes;
#pragma unroll
  for (int a = 0; a < kEach; ++a) {
#pragma unroll
    for (int b = 0; b < kEach; ++b) sums[a][b] = 0;
  }
  for (int64_t term = 0; term < num_terms; term += kStep) {
    load_slice<T>(left, row, term, num_terms, left_slice);
    load_slice<T>(right, column, term, num_terms, right_slice);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      Sum<T> l[kEach], r[kEach];
#pragma unroll
      for (int a = 0; a < kEach; ++a) l[a] = left_slice[k][lane_row + kLanes * a];
#pragma unroll
      for (int b = 0; b < kEach; ++b) r[b] = right_slice[k][lane_column + kLanes * b];
#pragma unroll
      for (int a = 0; a < kEach; ++a) {
#pragma unroll
        for (int b = 0; b < kEach; ++b) sums[a][b] += l[a] * r[b];
      }
    }
    __syncthreads();
  }
}

/// Calls fn(row, column, sum) for each of the thread's elements that lies within the matrix.
template <typename S, typename Fn>
__device__ __forceinline__ void for_each_sum(const S (&sums)[kEach][kEach], int64_t row,
                                             int64_t column, int64_t num_rows, int64_t num_columns,
                                             Fn&& fn) {
#pragma unroll
  for (int a = 0; a < kEach; ++a) {
    const int64_t r = row + threadIdx.x / kLanes + kLanes * a;
#pragma unroll
    for (int b = 0; b < kEach; ++b) {
      const int64_t c = column + threadIdx.x % kLanes + kLanes * b;
      if (r < num_rows && c < num_columns) fn(r, c, sums[a][b]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) product_kernel(GroupedProduct p) {
  const int64_t expert = blockIdx.z;
  const int64_t begin = expert == 0 ? 0 : p.offsets[expert - 1];
  const int64_t num_rows = p.offsets[expert] - begin;
  const Factor<T> rows{static_cast<const T*>(p.x) + begin * p.in_size, num_rows, p.in_size, 1};
  const Factor<T> weights{static_cast<const T*>(p.w) + expert * p.w_expert_stride, p.out_size,
                          p.w_out_stride, p.w_in_stride};
  T* const y = static_cast<T*>(p.y) + begin * p.out_size;
  const int64_t column = int64_t{blockIdx.x} * kTile;
  for (int64_t row = int64_t{blockIdx.y} * kTile; row < num_rows;
       row += int64_t{gridDim.y} * kTile) {
    Sum<T> sums[kEach][kEach];
    multiply<T>(rows, weights, row, column, p.in_size, sums);
    for_each_sum(sums, row, column, num_rows, p.out_size,
                 [&](int64_t r, int64_t c, Sum<T> sum) { y[r * p.out_size + c] = narrow<T>(sum); });
  }
}

template <typename T, typename G>
__global__ void __launch_bounds__(kThreads) weight_grad_kernel(GroupedWeightGrad p) {
  const int64_t expert = blockIdx.z;
  const int64_t begin = expert == 0 ? 0 : p.offsets[expert - 1];
  const int64_t num_rows = p.offsets[expert] - begin;
  if (num_rows <= 0) return;
  const Factor<T> dy{static_cast<const T*>(p.dy) + begin * p.out_size, p.out_size, 1, p.out_size};
  const Factor<T> x{static_cast<const T*>(p.x) + begin * p.in_size, p.in_size, 1, p.in_size};
  G* const grad = static_cast<G*>(p.grad) + expert * p.out_size * p.in_size;
  const int64_t row = int64_t{blockIdx.y} * kTile, column = int64_t{blockIdx.x} * kTile;
  Sum<T> sums[kEach][kEach];
  multiply<T>(dy, x, row, column, num_rows, sums);
  for_each_sum(sums, row, column, p.out_size, p.in_size, [&](int64_t r, int64_t c, Sum<T> sum) {
    G& element = grad[r * p.in_size + c];
    element = narrow<G>(widen(element) + sum);
  });
}

unsigned tiles(int64_t size) {
  return static_cast<unsigned>((size + kTile - 1) / kTile);
}

/// Workers over an expert's row tiles: twice what even loads would need, so that a loaded expert
/// has help; those without a tile end at once.
unsigned row_workers(int64_t num_rows, int64_t num_experts) {
  const int64_t even = 2 * num_rows / (num_experts * kTile) + 1;
  return static_cast<unsigned>(std::min<int64_t>({even, tiles(num_rows), 65535}));
}

void check_grid(const char* name, int64_t num_experts, int64_t tiles_down) {
  if (num_experts > 65535 || tiles_down > 65535) {
    kernels::detail::raise_invalid(name, "more than 65535 experts or 4194240 output features");
  }
}

}  // namespace

void grouped_product(const GroupedProduct& p, Stream stream) {
  if (p.num_rows == 0 || p.num_experts == 0 || p.out_size == 0) return;
  check_grid("grouped_product", p.num_experts, 0);
  const dim3 grid(tiles(p.out_size), row_workers(p.num_rows, p.num_experts),
                  static_cast<unsigned>(p.num_experts));
  const auto launch = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    product_kernel<T><<<grid, kThreads, 0, detail::cuda_stream(stream)>>>(p);
  };
  if (p.dtype == DType::kF64) {
    launch(static_cast<double*>(nullptr));
  } else {
    detail::dispatch_float("grouped_product", p.dtype, launch);
  }
  detail::check_launch("grouped_product");
}

void grouped_weight_grad(const GroupedWeightGrad& p, Stream stream) {
  if (p.num_rows == 0 || p.num_experts == 0 || p.out_size == 0 || p.in_size == 0) return;
  check_grid("grouped_weight_grad", p.num_experts, tiles(p.out_size));
  const dim3 grid(tiles(p.in_size), tiles(p.out_size), static_cast<unsigned>(p.num_experts));
  const cudaStream_t on = detail::cuda_stream(stream);
  const bool same = p.grad_dtype == p.dtype;
  if (p.dtype == DType::kF64 && same) {
    weight_grad_kernel<double, double><<<grid, kThreads, 0, on>>>(p);
  } else if (p.dtype == DType::kF32 && same) {
    weight_grad_kernel<float, float><<<grid, kThreads, 0, on>>>(p);
  } else if (p.dtype == DType::kBF16 && same) {
    weight_grad_kernel<__nv_bfloat16, __nv_bfloat16><<<grid, kThreads, 0, on>>>(p);
  } else if (p.dtype == DType::kBF16 && p.grad_dtype == DType::kF32) {
    weight_grad_kernel<__nv_bfloat16, float><<<grid, kThreads, 0, on>>>(p);
  } else {
    kernels::detail::raise_invalid(
        "grouped_weight_grad", std::string("grad: expected the operands' dtype or fp32, got ") +
                                   name_of(p.grad_dtype) + " for operands in " + name_of(p.dtype));
  }
  detail::check_launch("grouped_weight_grad");
}

}  // namespace dsv3::kernels::cuda
