// SwiGLU whose results leave in FP8 tiles, in one or both orientations, with one read of its
// inputs: a block per 128×128 results (detail/fp8_tile.cuh), all of its loads in
// flight before the first use. Results are rounded to the dtype before they are quantised: the bits
// are those of the plain kernel and quantize_tiles in turn. Bytes in BF16 with both forms: forward
// 4·T·I read, 2·T·I written; backward 6·T·I read, 4·T·I written.

#include "kernels/detail/fp8_tile.cuh"
#include "kernels/detail/swiglu.cuh"
#include "kernels/detail/swiglu_fp8.h"

namespace dsv3::kernels::cuda::detail {
namespace {

constexpr int kBackwardBand = 4;
constexpr int kBackwardThreads = 16 * kTile / kBackwardBand;

struct Tiling {
  unsigned across;  // tiles of a row of results
  int64_t padded;   // tokens of the transposed form
};

template <bool kVec, typename T, int kBand>
__device__ __forceinline__ void store_values(const TileValues<T, kBand>& values, T* y,
                                             const TilePlace& place) {
  const int first = tile_first_row<kBand>();
  const int64_t left = place.columns_left();
  y += (place.row0 + first) * place.width + place.column0 + 8 * tile_octet();
#pragma unroll
  for (int j = 0; j < kBand; ++j) {
    if (first + j >= place.rows) continue;
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = values.at(j, e);
    if constexpr (kVec) {
      if (left > 0) store8(y + j * place.width, v);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < left) y[j * place.width + e] = from_float<T>(v[e]);
      }
    }
  }
}

template <typename T, bool kVec, bool kColumns>
__global__ void __launch_bounds__(kTileThreads, 3) forward_kernel(SwigluForward p, Tiling tiling) {
  const int64_t row0 = int64_t{blockIdx.x / tiling.across} * kTile;
  const TilePlace place{
      .row0 = row0,
      .column0 = int64_t{blockIdx.x % tiling.across} * kTile,
      .rows = static_cast<int>(min(p.num_tokens - row0, int64_t{kTile})),
      .width = p.intermediate,
  };
  const int first = tile_first_row();
  const int64_t left = place.columns_left();
  const T* gate = static_cast<const T*>(p.gate_up) + (row0 + first) * 2 * p.intermediate +
                  place.column0 + 8 * tile_octet();
  TileValues<T> values, up;
#pragma unroll
  for (int j = 0; j < kTileBand; ++j) {
    const int64_t count = first + j < place.rows ? left : 0;
    values.template load<kVec>(j, gate + j * 2 * p.intermediate, count);
    up.template load<kVec>(j, gate + j * 2 * p.intermediate + p.intermediate, count);
  }
#pragma unroll
  for (int j = 0; j < kTileBand; ++j) {
    const bool weighted = p.row_weight != nullptr && first + j < place.rows;
    const float weight = weighted ? p.row_weight[row0 + first + j] : 1.0f;
    float y[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) y[e] = swiglu_value<T>(values.at(j, e), up.at(j, e), weight);
    values.set(j, y);
  }
  if (p.y != nullptr) store_values<kVec>(values, static_cast<T*>(p.y), place);
  if (p.rows.data != nullptr) emit_rows<kVec>(values, p.rows, p.rule, place);
  if constexpr (kColumns) {
    __shared__ ColumnShared<> shared;
    emit_columns(values, p.columns, p.rule, place, tiling.padded, shared);
  }
}

/// The intermediate size is a multiple of 128, so that no tile holds gradients of both gate and up.
template <typename T, bool kVec, bool kColumns>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    backward_kernel(SwigluBackward p, Tiling tiling) {
  constexpr int kBand = kBackwardBand;
  const int64_t row0 = int64_t{blockIdx.x / tiling.across} * kTile;
  const int64_t tile = blockIdx.x % tiling.across;
  TilePlace place{
      .row0 = row0,
      .column0 = tile * kTile,
      .rows = static_cast<int>(min(p.num_tokens - row0, int64_t{kTile})),
      .width = 2 * p.intermediate,
  };
  const int first = tile_first_row<kBand>();
  const int64_t column = place.column0 + 8 * tile_octet();
  const T* from = static_cast<const T*>(p.gate_up) + (row0 + first) * 2 * p.intermediate + column;
  const T* dy = static_cast<const T*>(p.dy) + (row0 + first) * p.intermediate + column;
  TileValues<T, kBand> gate, up, d;
  float shares[kBand];
#pragma unroll
  for (int j = 0; j < kBand; ++j) {
    const int64_t count = first + j < place.rows ? 8 : 0;
    gate.template load<kVec>(j, from + j * 2 * p.intermediate, count);
    up.template load<kVec>(j, from + j * 2 * p.intermediate + p.intermediate, count);
    d.template load<kVec>(j, dy + j * p.intermediate, count);
  }
#pragma unroll
  for (int j = 0; j < kBand; ++j) {
    const bool exists = first + j < place.rows;
    const float weight = p.row_weight != nullptr && exists ? p.row_weight[row0 + first + j] : 1.0f;
    float g[8], u[8];
    shares[j] = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      g[e] = gate.at(j, e);
      u[e] = up.at(j, e);
      shares[j] += swiglu_gradient<T>(g[e], u[e], d.at(j, e), weight);
    }
    gate.set(j, g);
    up.set(j, u);
  }
  if (p.drow_weight != nullptr) {
    const float share = half_warp_reduce(shares, [](float a, float b) { return a + b; });
    const int row = first + tile_octet() / (16 / kBand);
    if (row < place.rows && tile_octet() % (16 / kBand) == 0) {
      p.scratch[tile * p.num_tokens + row0 + row] = share;
    }
  }
  TilePlace up_place = place;
  up_place.column0 += p.intermediate;
  if (p.dgate_up != nullptr) {
    store_values<kVec>(gate, static_cast<T*>(p.dgate_up), place);
    store_values<kVec>(up, static_cast<T*>(p.dgate_up), up_place);
  }
  if (p.rows.data != nullptr) {
    emit_rows<kVec>(gate, p.rows, p.rule, place);
    emit_rows<kVec>(up, p.rows, p.rule, up_place);
  }
  if constexpr (kColumns) {
    __shared__ ColumnShared<kBand> shared;
    emit_columns(gate, p.columns, p.rule, place, tiling.padded, shared);
    emit_columns(up, p.columns, p.rule, up_place, tiling.padded, shared);
  }
}

/// The tiles' shares of a row's sum, in their order.
__global__ void __launch_bounds__(kTileThreads)
    sum_shares_kernel(const float* shares, int64_t tiles, int64_t num_tokens, float* sums) {
  const int64_t t = int64_t{blockIdx.x} * kTileThreads + threadIdx.x;
  if (t >= num_tokens) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = 0; i < tiles; ++i) sum += shares[i * num_tokens + t];
  sums[t] = sum;
}

unsigned tiles_of(int64_t size) {
  return static_cast<unsigned>((size + kTile - 1) / kTile);
}

/// Calls fn with a null pointer of the dtype and whether accesses are whole vectors and columns are
/// wanted, as constants.
template <typename Fn>
void dispatch(const char* name, DType dtype, bool vectorised, bool columns, Fn&& fn) {
  dispatch_float(name, dtype, [&](auto* type) {
    if (vectorised && columns) {
      fn(type, std::true_type(), std::true_type());
    } else if (vectorised) {
      fn(type, std::true_type(), std::false_type());
    } else if (columns) {
      fn(type, std::false_type(), std::true_type());
    } else {
      fn(type, std::false_type(), std::false_type());
    }
  });
}

}  // namespace

void swiglu_forward_fp8(const SwigluForward& p, Stream stream) {
  const Tiling tiling{tiles_of(p.intermediate), int64_t{tiles_of(p.num_tokens)} * kTile};
  const unsigned grid = tiling.across * tiles_of(p.num_tokens);
  const bool vectorised = p.intermediate % kVector == 0 && aligned16(p.gate_up) && aligned16(p.y) &&
                          aligned16(p.rows.data);
  const cudaStream_t on = cuda_stream(stream);
  dispatch("swiglu", p.dtype, vectorised, p.columns.data != nullptr,
           [&](auto* type, auto vec, auto columns) {
             using T = std::remove_pointer_t<decltype(type)>;
             forward_kernel<T, decltype(vec)::value, decltype(columns)::value>
                 <<<grid, kTileThreads, 0, on>>>(p, tiling);
           });
  check_launch("swiglu (fp8)");
}

void swiglu_backward_fp8(const SwigluBackward& p, Stream stream) {
  if (p.intermediate % kTile != 0) {
    kernels::detail::raise_invalid("swiglu_backward",
                                   "intermediate: FP8 gradients need a multiple of 128, got " +
                                       std::to_string(p.intermediate));
  }
  const Tiling tiling{tiles_of(p.intermediate), int64_t{tiles_of(p.num_tokens)} * kTile};
  const unsigned grid = tiling.across * tiles_of(p.num_tokens);
  const bool vectorised =
      aligned16(p.gate_up) && aligned16(p.dy) && aligned16(p.dgate_up) && aligned16(p.rows.data);
  const cudaStream_t on = cuda_stream(stream);
  dispatch("swiglu_backward", p.dtype, vectorised, p.columns.data != nullptr,
           [&](auto* type, auto vec, auto columns) {
             using T = std::remove_pointer_t<decltype(type)>;
             backward_kernel<T, decltype(vec)::value, decltype(columns)::value>
                 <<<grid, kBackwardThreads, 0, on>>>(p, tiling);
           });
  check_launch("swiglu_backward (fp8)");
  if (p.drow_weight == nullptr) return;
  const auto blocks = static_cast<unsigned>((p.num_tokens + kTileThreads - 1) / kTileThreads);
  sum_shares_kernel<<<blocks, kTileThreads, 0, on>>>(p.scratch, tiling.across, p.num_tokens,
                                                     p.drow_weight);
  check_launch("swiglu_backward (row weight)");
}

}  // namespace dsv3::kernels::cuda::detail
