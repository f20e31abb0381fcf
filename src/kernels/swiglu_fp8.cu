// SwiGLU whose results leave in FP8 tiles, in one or both orientations, with one read of its
// inputs: 512 threads per 128×128 results (detail/fp8_tile.cuh). Backward, bound by its arithmetic,
// has the next tile's inputs on their way meanwhile (detail/tile_ring.cuh). Results are rounded to
// the dtype before they are quantised: the bits are those of the plain kernel and quantize_tiles in
// turn. Bytes in BF16 with both forms: forward 4·T·I read, 2·T·I written; backward 6·T·I read,
// 4·T·I written.

#include <algorithm>

#include "kernels/detail/swiglu.cuh"
#include "kernels/detail/swiglu_fp8.h"
#include "kernels/detail/tile_ring.cuh"

namespace dsv3::kernels::cuda::detail {
namespace {

constexpr int kBand = 4;  // rows of a thread: its inputs leave no registers for more
constexpr int kThreads = 16 * kTile / kBand;

struct Tiling {
  unsigned across, down;       // tiles of results
  int64_t padded;              // tokens of the transposed form
  unsigned* ticket = nullptr;  // how many tiles beyond two of each block were given out
};

/// A tile of results, by its number.
struct Tile {
  unsigned row, column;

  __device__ __forceinline__ Tile(const Tiling& tiling, unsigned number)
      : row(number / tiling.across), column(number % tiling.across) {}
  __device__ __forceinline__ explicit Tile(uint2 at) : row(at.x), column(at.y) {}
};

/// A thread's share of a tile of `width` columns.
struct Share {
  int64_t row0, column0;  // of the tile
  int first;              // row of the tile
  int rows;               // that exist, ≤ kBand or more
  int64_t columns;        // that exist; ≤ 0 = none

  __device__ __forceinline__ Share(const Tile& at, int64_t num_tokens, int64_t width)
      : row0(int64_t{at.row} * kTile),
        column0(int64_t{at.column} * kTile),
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

/// A block per tile.
template <typename T, bool kVec, bool kColumns>
__global__ void __launch_bounds__(kThreads, kVec && sizeof(T) == 2 ? 2 : 1)
    forward_kernel(SwigluForward p, Tiling tiling) {
  __shared__ std::conditional_t<kColumns, ColumnShared, char> shared;
  const Share share(Tile(tiling, blockIdx.x), p.num_tokens, p.intermediate);
  const float weight = share.weight(p.row_weight);
  if constexpr (kColumns) shared.prepare();
  TileValues<T, kBand> values, up;
  const T* gate = static_cast<const T*>(p.gate_up) + share.offset(2 * p.intermediate);
#pragma unroll
  for (int j = 0; j < kBand; ++j, gate += 2 * p.intermediate) {
    const int64_t columns = j < share.rows ? share.columns : 0;
    values.template load<kVec>(j, gate, columns);
    up.template load<kVec>(j, gate + p.intermediate, columns);
  }
#pragma unroll
  for (int j = 0; j < kBand; ++j) {
    const float row_weight = __shfl_sync(kFullMask, weight, j, kBand);
    float y[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) y[e] = swiglu_value<T>(values.at(j, e), up.at(j, e), row_weight);
    values.set(j, y);
  }
  const TilePlace place = share.place(p.intermediate);
  if (p.y != nullptr) store_values<kVec>(values, static_cast<T*>(p.y), place);
  if (p.rows.data != nullptr) emit_rows<kVec>(values, p.rows, p.rule, place);
  if constexpr (kColumns) emit_columns(values, p.columns, p.rule, place, tiling.padded, shared);
}

/// A thread's share of what backward reads: gate and up of [T, 2I] and dy of [T, I]. With kRing the
/// rows of the next tile are asked for as this one's are used; without, all loads are in flight
/// before the first use. In order: prepare(), then for each tile begin(), take() and ask() for each
/// row, end().
template <typename T, bool kVec, bool kRing>
class Inputs {
 public:
  TileValues<T, kBand> gate, up, d;

  __device__ __forceinline__ Inputs(void* ring, const SwigluBackward& p)
      : ring_(ring),
        p_(p),
        gate_up_(static_cast<const T*>(p.gate_up)),
        dy_(static_cast<const T*>(p.dy)) {}

  __device__ __forceinline__ void prepare(const Share& share) {
    if constexpr (!kRing) return;
    aim(share, true);
#pragma unroll
    for (int j = 0; j < kBand; ++j) ask(j);
    end();
  }
  /// `next`: the tile after the share's, which may not exist.
  __device__ __forceinline__ void begin(const Share& share, const Share& next, bool exists) {
    if constexpr (kRing) {
      aim(next, exists);
      ptx::async_wait<0>();
    } else {
      const T* from = gate_up_ + share.offset(2 * p_.intermediate);
      load_share<kVec>(gate, from, 2 * p_.intermediate, share.rows, share.columns);
      load_share<kVec>(up, from + p_.intermediate, 2 * p_.intermediate, share.rows, share.columns);
      load_share<kVec>(d, dy_ + share.offset(p_.intermediate), p_.intermediate, share.rows,
                       share.columns);
    }
  }
  __device__ __forceinline__ void take(int j) {
    if constexpr (kRing) {
      gate.take(j, ring_.word(0, j));
      up.take(j, ring_.word(1, j));
      d.take(j, ring_.word(2, j));
    }
  }
  __device__ __forceinline__ void ask(int j) {
    if constexpr (kRing) {
      const bool exists = j < rows_;
      ring_.ask(0, j, next_, exists);
      ring_.ask(1, j, next_ + p_.intermediate, exists);
      ring_.ask(2, j, next_d_, exists);
      next_ += 2 * p_.intermediate;
      next_d_ += p_.intermediate;
    }
  }
  __device__ __forceinline__ void end() {
    if constexpr (kRing) ptx::async_commit();
  }

 private:
  __device__ __forceinline__ void aim(const Share& share, bool exists) {
    next_ = gate_up_ + share.offset(2 * p_.intermediate);
    next_d_ = dy_ + share.offset(p_.intermediate);
    rows_ = exists && share.columns > 0 ? share.rows : 0;
  }

  TileRing<kBand, 3> ring_;
  const SwigluBackward& p_;
  const T *gate_up_, *dy_;
  const T *next_ = nullptr, *next_d_ = nullptr;  // of the row that is asked for next
  int rows_ = 0;                                 // that are there to be asked for
};

/// With kRing a block takes tile after tile, without it has one. The tiles are given out in order,
/// by tickets: blocks that take every gridDim.x-th drift apart, and memory then has more pages open
/// than it likes (5 % on an H200). The intermediate size is a multiple of 128, so that no tile
/// holds gradients of both gate and up.
template <typename T, bool kVec, bool kColumns, bool kRing>
__global__ void __launch_bounds__(kThreads, kRing ? 2 : 1)
    backward_kernel(SwigluBackward p, Tiling tiling) {
  extern __shared__ __align__(128) unsigned char words[];
  __shared__ std::conditional_t<kColumns, ColumnShared, char> shared;
  __shared__ uint2 next[2];  // row and column of the tile after the block's, in turn
  Inputs<T, kVec, kRing> in(words, p);
  Tile tile(tiling, blockIdx.x);
  const auto give_out = [&](uint2& to, unsigned number) {
    const Tile given(tiling, number);
    to = make_uint2(given.row, given.column);
  };
  in.prepare(Share(tile, p.num_tokens, p.intermediate));
  if (kRing && threadIdx.x == 0) give_out(next[0], blockIdx.x + gridDim.x);
  if constexpr (kColumns) shared.prepare();
  if constexpr (!kColumns) __syncthreads();
  for (unsigned turn = 0; tile.row < tiling.down; turn ^= 1) {
    const Share share(tile, p.num_tokens, p.intermediate);
    const float weight = share.weight(p.row_weight);
    if constexpr (kRing) {
      tile = Tile(next[turn]);
      if (threadIdx.x == 0) {
        give_out(next[turn ^ 1], atomicAdd(tiling.ticket, 1) + 2 * gridDim.x);
      }
    } else {
      tile.row = tiling.down;
    }
    in.begin(share, Share(tile, p.num_tokens, p.intermediate), tile.row < tiling.down);
    auto &gate = in.gate, &up = in.up, &d = in.d;
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
        swiglu_gradient<T>(g[e], u[e], d.at(j, e), row_weight, shares[j]);
      }
      gate.set(j, g);
      up.set(j, u);
      in.ask(j);
    }
    in.end();
    if constexpr (!kColumns) __syncthreads();  // emit_columns has barriers of its own
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
  ptx::let_second_begin();
}

/// The tiles' shares of a row's sum, in their order.
__global__ void __launch_bounds__(kTileThreads)
    sum_shares_kernel(const float* shares, int64_t tiles, int64_t num_tokens, float* sums) {
  const int64_t t = int64_t{blockIdx.x} * kTileThreads + threadIdx.x;
  ptx::wait_for_first();
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

Tiling tiling_of(int64_t num_tokens, int64_t intermediate) {
  return {.across = tiles_of(intermediate),
          .down = tiles_of(num_tokens),
          .padded = int64_t{tiles_of(num_tokens)} * kTile};
}

}  // namespace

void swiglu_forward_fp8(const SwigluForward& p, Stream stream) {
  const Tiling tiling = tiling_of(p.num_tokens, p.intermediate);
  const unsigned tiles = tile_grid("swiglu", p.num_tokens, p.intermediate);
  const bool vectorised = p.intermediate % kVector == 0 && aligned16(p.gate_up) && aligned16(p.y) &&
                          aligned16(p.rows.data);
  const cudaStream_t on = cuda_stream(stream);
  dispatch("swiglu", p.dtype, vectorised, p.columns.data != nullptr,
           [&](auto* type, auto vec, auto columns) {
             using T = std::remove_pointer_t<decltype(type)>;
             constexpr bool kVec = decltype(vec)::value, kColumns = decltype(columns)::value;
             forward_kernel<T, kVec, kColumns><<<tiles, kThreads, 0, on>>>(p, tiling);
           });
  check_launch("swiglu (fp8)");
}

void swiglu_backward_fp8(const SwigluBackward& p, Stream stream) {
  if (p.intermediate % kTile != 0) {
    kernels::detail::raise_invalid("swiglu_backward",
                                   "intermediate: FP8 gradients need a multiple of 128, got " +
                                       std::to_string(p.intermediate));
  }
  if (p.scratch == nullptr) {
    kernels::detail::raise_invalid("swiglu_backward", "scratch: an FP8 form needs it");
  }
  Tiling tiling = tiling_of(p.num_tokens, p.intermediate);
  const unsigned tiles = tile_grid("swiglu_backward", p.num_tokens, p.intermediate);
  tiling.ticket = reinterpret_cast<unsigned*>(p.scratch) + int64_t{tiling.across} * p.num_tokens;
  const bool vectorised =
      aligned16(p.gate_up) && aligned16(p.dy) && aligned16(p.dgate_up) && aligned16(p.rows.data);
  const cudaStream_t on = cuda_stream(stream);
  dispatch("swiglu_backward", p.dtype, vectorised, p.columns.data != nullptr,
           [&](auto* type, auto vec, auto columns) {
             using T = std::remove_pointer_t<decltype(type)>;
             constexpr bool kVec = decltype(vec)::value, kColumns = decltype(columns)::value;
             if constexpr (kVec && sizeof(T) == 2) {
               auto* const ring = backward_kernel<T, kVec, kColumns, true>;
               constexpr int kBytes = TileRing<kBand, 3>::kBytes;
               const unsigned blocks = std::min(ring_blocks(ring, kThreads, kBytes), tiles);
               if (blocks > 0) {
                 cudaMemsetAsync(tiling.ticket, 0, sizeof(unsigned), on);
                 return ring<<<blocks, kThreads, kBytes, on>>>(p, tiling);
               }
               // Shared memory is too small.
             }
             backward_kernel<T, kVec, kColumns, false><<<tiles, kThreads, 0, on>>>(p, tiling);
           });
  check_launch("swiglu_backward (fp8)");
  if (p.drow_weight == nullptr) return;
  const auto blocks = static_cast<unsigned>((p.num_tokens + kTileThreads - 1) / kTileThreads);
  launch_second(sum_shares_kernel, blocks, kTileThreads, on, p.scratch, tiling.across, p.num_tokens,
                p.drow_weight);
  check_launch("swiglu_backward (row weight)");
}

}  // namespace dsv3::kernels::cuda::detail
