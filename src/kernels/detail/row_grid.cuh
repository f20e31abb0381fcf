#pragma once

// The grid of kernels over rows of any width.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace dsv3::kernels::cuda::detail {

/// A grid over (columns, rows) for kernels that loop over rows: threads along the columns first.
struct RowGrid {
  dim3 grid, block;
};
inline RowGrid row_grid(int64_t rows, int64_t columns) {
  unsigned width = 32;
  while (width < 256 && width < columns) width *= 2;
  const unsigned height = 256 / width;
  const int64_t down = std::min<int64_t>((rows + height - 1) / height, 65535);
  return {dim3(static_cast<unsigned>((columns + width - 1) / width), static_cast<unsigned>(down)),
          dim3(width, height)};
}

}  // namespace dsv3::kernels::cuda::detail
