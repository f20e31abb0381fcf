// SwiGLU whose results leave in FP8 tiles, in one or both orientations, with one read of its
// inputs: 512 threads per 128×128 results (detail/fp8_tile.cuh), the next ones' inputs on their way
// meanwhile (detail/tile_ring.cuh). Results are rounded to the dtype before they are quantised: the
// bits are those of the plain kernel and quantize_tiles in turn. Bytes in BF16 with both forms:
// forward 4·T·I read, 2·T·I written; backward 6·T·I read, 4·T·I written.

#include "kernels/detail/swiglu.cuh"
#include "kernels/detail/swiglu_fp8.h"
#include "kernels/detail/tile_ring.cuh"

namespace dsv3::kernels::cuda::detail {
namespace {

constexpr int kBand = 4;  // rows of a thread: its inputs leave no registers for more
constexpr int kThreads = 16 * kTile / kBand;

struct Tiling {
  unsigned across, tiles;  // tiles of a row of results, and all
  int64_t padded;          // tokens of the transposed form
};

/// A thread's share of a tile of `width` columns.
struct Share {
  int64_t row0, column0;  // of the tile
  int first;              // row of the tile
  int rows;               // that exist, ≤ kBand or more
  int64_t columns;        // that exist; ≤ 0 = none

  __device__ __forceinline__ Share(const Tiling& tiling, unsigned tile, int64_t num_tokens,
                                   int64_t width)
      : row0(int64_t{tile / tiling.across} * kTile),
        column0(int64_t{tile % tiling.across} * kTile),
        first(tile_first_row<kBand>()),
        rows(static_cast<int>(min(num_tokens - row0 - first, int64_t{kTile}))),
        columns(width - column0 - 8 * tile_octet()) {}

  __device__ __forceinline__ TilePlace place(int64_t width) const {
    return {.row0 = row0, .column0 = column0, .rows = rows + first, .width = width};
  }
  /// Of the share's first number in a matrix of this row stride.
  __device__ __forceinline__ int64_t offset(int64_t stride) const {
    return (row0 + first) * stride + column0 + 8 * tile_octet();
  }
  /// The weight of row octet mod kBand.
  __device__ __forceinline__ float weight(const float* row_weight) const {
    const int mine = tile_octet() % kBand;
    return row_weight != nullptr && mine < rows ? row_weight[row0 + first + mine] : 1.0f;
  }
};

template <bool kVec, typename T>
__device__ __forceinline__ void store_values(const TileValues<T, kBand>& values, T* y,
                                             const TilePlace& place) {
  const int first = tile_first_row<kBand>();
  const int64_t left = place.columns_left();
  y += (place.row0 + first) * place.width + place.column0 + 8 * tile_octet();
#pragma unroll
  for (int j = 0; j < kBand; ++j, y += place.width) {
    if (first + j >= place.rows) continue;
    if constexpr (kVec) {
      if (left > 0) values.row(j).store(y);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < left) y[e] = from_float<T>(values.at(j, e));
      }
    }
  }
}

/// A thread's share of what a kernel reads: gate and up of [T, 2I], and with kMatrices = 3 dy of
/// [T, I]. With kRing the rows of the next tile are asked for as this one's are used; without, all
/// loads are in flight before the first use. In order: prepare(), then for each tile begin(),
/// take() and ask() for each row, end().
template <typename T, int kMatrices, bool kVec, bool kRing>
class Inputs {
 public:
  TileValues<T, kBand> values[kMatrices];

  __device__ __forceinline__ Inputs(void* ring, const Tiling& tiling, int64_t num_tokens,
                                    const void* gate_up, const void* dy, int64_t intermediate)
      : ring_(ring),
        tiling_(tiling),
        num_tokens_(num_tokens),
        gate_up_(static_cast<const T*>(gate_up)),
        dy_(static_cast<const T*>(dy)),
        intermediate_(intermediate) {}

  __device__ __forceinline__ Share share_of(unsigned tile) const {
    return Share(tiling_, tile, num_tokens_, intermediate_);
  }
  __device__ __forceinline__ void prepare(unsigned first) {
    if constexpr (!kRing) return;
    aim(share_of(first), true);
#pragma unroll
    for (int j = 0; j < kBand; ++j) ask(j);
    end();
  }
  /// `next`: the tile after the share's, which may not exist.
  __device__ __forceinline__ void begin(const Share& share, unsigned next) {
    if constexpr (kRing) {
      aim(share_of(min(next, tiling_.tiles - 1)), next < tiling_.tiles);
      ptx::async_wait<0>();
    } else {
      load(share);
    }
  }
  __device__ __forceinline__ void take(int j) {
    if constexpr (kRing) {
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) values[m].take(j, ring_.word(m, j));
    }
  }
  __device__ __forceinline__ void ask(int j) {
    if constexpr (kRing) {
      const bool exists = j < rows_;
      ring_.ask(0, j, gate_, exists);
      ring_.ask(1, j, gate_ + intermediate_, exists);
      gate_ += 2 * intermediate_;
      if constexpr (kMatrices == 3) {
        ring_.ask(2, j, d_, exists);
        d_ += intermediate_;
      }
    }
  }
  __device__ __forceinline__ void end() {
    if constexpr (kRing) ptx::async_commit();
  }

 private:
  __device__ __forceinline__ void aim(const Share& share, bool exists) {
    gate_ = gate_up_ + share.offset(2 * intermediate_);
    if constexpr (kMatrices == 3) d_ = dy_ + share.offset(intermediate_);
    rows_ = exists && share.columns > 0 ? share.rows : 0;
  }
  __device__ __forceinline__ void load(const Share& share) {
    const T* gate = gate_up_ + share.offset(2 * intermediate_);
    const T* d = dy_ + share.offset(intermediate_);
#pragma unroll
    for (int j = 0; j < kBand; ++j) {
      const int64_t columns = j < share.rows ? share.columns : 0;
      values[0].template load<kVec>(j, gate, columns);
      values[1].template load<kVec>(j, gate + intermediate_, columns);
      gate += 2 * intermediate_;
      if constexpr (kMatrices == 3) {
        values[2].template load<kVec>(j, d, columns);
        d += intermediate_;
      }
    }
  }

  TileRing<kBand, kMatrices> ring_;
  const Tiling& tiling_;
  int64_t num_tokens_;
  const T *gate_up_, *dy_;
  int64_t intermediate_;
  const T *gate_ = nullptr, *d_ = nullptr;  // of the row that is asked for next
  int rows_ = 0;                            // that are there to be asked for
};

/// With kRing a block takes every gridDim.x-th tile, without it has one.
template <typename T, bool kVec, bool kColumns, bool kRing>
__global__ void __launch_bounds__(kThreads, kRing ? 2 : 1)
    forward_kernel(SwigluForward p, Tiling tiling) {
  extern __shared__ __align__(128) unsigned char words[];
  __shared__ std::conditional_t<kColumns, ColumnShared, char> shared;
  Inputs<T, 2, kVec, kRing> in(words, tiling, p.num_tokens, p.gate_up, nullptr, p.intermediate);
  in.prepare(blockIdx.x);
  if constexpr (kColumns) shared.prepare();
  for (unsigned tile = blockIdx.x; tile < tiling.tiles; tile += gridDim.x) {
    const Share share = in.share_of(tile);
    const float weight = share.weight(p.row_weight);
    in.begin(share, tile + gridDim.x);
    auto& [values, up] = in.values;
#pragma unroll
    for (int j = 0; j < kBand; ++j) {
      in.take(j);
      const float row_weight = __shfl_sync(kFullMask, weight, j, kBand);
      float y[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) y[e] = swiglu_value<T>(values.at(j, e), up.at(j, e), row_weight);
      values.set(j, y);
      in.ask(j);
    }
    in.end();
    const TilePlace place = share.place(p.intermediate);
    if (p.y != nullptr) store_values<kVec>(values, static_cast<T*>(p.y), place);
    if (p.rows.data != nullptr) emit_rows<kVec>(values, p.rows, p.rule, place);
    if constexpr (kColumns) emit_columns(values, p.columns, p.rule, place, tiling.padded, shared);
  }
}

/// The intermediate size is a multiple of 128, so that no tile holds gradients of both gate and up.
template <typename T, bool kVec, bool kColumns, bool kRing>
__global__ void __launch_bounds__(kThreads, kRing ? 2 : 1)
    backward_kernel(SwigluBackward p, Tiling tiling) {
  extern __shared__ __align__(128) unsigned char words[];
  __shared__ std::conditional_t<kColumns, ColumnShared, char> shared;
  Inputs<T, 3, kVec, kRing> in(words, tiling, p.num_tokens, p.gate_up, p.dy, p.intermediate);
  in.prepare(blockIdx.x);
  if constexpr (kColumns) shared.prepare();
  for (unsigned tile = blockIdx.x; tile < tiling.tiles; tile += gridDim.x) {
    const Share share = in.share_of(tile);
    const float weight = share.weight(p.row_weight);
    in.begin(share, tile + gridDim.x);
    auto& [gate, up, d] = in.values;
    float shares[kBand];
#pragma unroll
    for (int j = 0; j < kBand; ++j) {
      in.take(j);
      const float row_weight = __shfl_sync(kFullMask, weight, j, kBand);
      float g[8], u[8];
      shares[j] = 0.0f;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        g[e] = gate.at(j, e);
        u[e] = up.at(j, e);
        shares[j] += swiglu_gradient<T>(g[e], u[e], d.at(j, e), row_weight);
      }
      gate.set(j, g);
      up.set(j, u);
      in.ask(j);
    }
    in.end();
    if (p.drow_weight != nullptr) {
      const float sum = half_warp_reduce(shares, [](float a, float b) { return a + b; });
      const int mine = tile_octet() / (16 / kBand);
      if (mine < share.rows && tile_octet() % (16 / kBand) == 0) {
        p.scratch[share.column0 / kTile * p.num_tokens + share.row0 + share.first + mine] = sum;
      }
    }
    const TilePlace place = share.place(2 * p.intermediate);
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
      emit_columns(gate, p.columns, p.rule, place, tiling.padded, shared);
      emit_columns(up, p.columns, p.rule, up_place, tiling.padded, shared);
    }
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

/// The kernel with a ring of `bytes` where shared memory holds it, else the one without.
template <typename Params>
void launch(void (*ring)(Params, Tiling), int bytes, void (*direct)(Params, Tiling),
            const Params& p, const Tiling& tiling, cudaStream_t stream) {
  const unsigned blocks = ring != nullptr ? ring_blocks(ring, kThreads, bytes) : 0;
  if (blocks > 0) {
    ring<<<std::min(blocks, tiling.tiles), kThreads, bytes, stream>>>(p, tiling);
  } else {
    direct<<<tiling.tiles, kThreads, 0, stream>>>(p, tiling);
  }
}

}  // namespace

void swiglu_forward_fp8(const SwigluForward& p, Stream stream) {
  const Tiling tiling{.across = tiles_of(p.intermediate),
                      .tiles = tile_grid("swiglu", p.num_tokens, p.intermediate),
                      .padded = int64_t{tiles_of(p.num_tokens)} * kTile};
  const bool vectorised = p.intermediate % kVector == 0 && aligned16(p.gate_up) && aligned16(p.y) &&
                          aligned16(p.rows.data);
  const cudaStream_t on = cuda_stream(stream);
  dispatch("swiglu", p.dtype, vectorised, p.columns.data != nullptr,
           [&](auto* type, auto vec, auto columns) {
             using T = std::remove_pointer_t<decltype(type)>;
             constexpr bool kVec = decltype(vec)::value, kColumns = decltype(columns)::value;
             void (*ring)(SwigluForward, Tiling) = nullptr;
             if constexpr (kVec && sizeof(T) == 2) ring = forward_kernel<T, kVec, kColumns, true>;
             launch(ring, TileRing<kBand, 2>::kBytes, forward_kernel<T, kVec, kColumns, false>, p,
                    tiling, on);
           });
  check_launch("swiglu (fp8)");
}

void swiglu_backward_fp8(const SwigluBackward& p, Stream stream) {
  if (p.intermediate % kTile != 0) {
    kernels::detail::raise_invalid("swiglu_backward",
                                   "intermediate: FP8 gradients need a multiple of 128, got " +
                                       std::to_string(p.intermediate));
  }
  const Tiling tiling{.across = tiles_of(p.intermediate),
                      .tiles = tile_grid("swiglu_backward", p.num_tokens, p.intermediate),
                      .padded = int64_t{tiles_of(p.num_tokens)} * kTile};
  const bool vectorised =
      aligned16(p.gate_up) && aligned16(p.dy) && aligned16(p.dgate_up) && aligned16(p.rows.data);
  const cudaStream_t on = cuda_stream(stream);
  dispatch("swiglu_backward", p.dtype, vectorised, p.columns.data != nullptr,
           [&](auto* type, auto vec, auto columns) {
             using T = std::remove_pointer_t<decltype(type)>;
             constexpr bool kVec = decltype(vec)::value, kColumns = decltype(columns)::value;
             void (*ring)(SwigluBackward, Tiling) = nullptr;
             if constexpr (kVec && sizeof(T) == 2) ring = backward_kernel<T, kVec, kColumns, true>;
             launch(ring, TileRing<kBand, 3>::kBytes, backward_kernel<T, kVec, kColumns, false>, p,
                    tiling, on);
           });
  check_launch("swiglu_backward (fp8)");
  if (p.drow_weight == nullptr) return;
  const auto blocks = static_cast<unsigned>((p.num_tokens + kTileThreads - 1) / kTileThreads);
  sum_shares_kernel<<<blocks, kTileThreads, 0, on>>>(p.scratch, tiling.across, p.num_tokens,
                                                     p.drow_weight);
  check_launch("swiglu_backward (row weight)");
}

}  // namespace dsv3::kernels::cuda::detail
