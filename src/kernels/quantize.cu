// FP8 tiles on the device: a block of 256 threads per 128×128 numbers, or 128 threads per 2×1024
// where rows alone are wanted, all of its loads in flight before the first use
// (detail/fp8_tile.cuh). Bytes for BF16: 2·T·K read once, T·K written per form; re-quantisation T·K
// and T·K. With groups every block looks up its own: the ends of up to 1024 groups, scanned by one
// warp.

#include "kernels/detail/fp8_strip.cuh"

namespace dsv3::kernels::cuda {
namespace {

using detail::kTile;
using detail::kTileBand;
using detail::kTileThreads;
using detail::tile_grid;
using detail::TilePlace;
using detail::tiles_of;
using detail::TileValues;

/// Where the rows of an output tile come from.
struct TileRows {
  int64_t source;
  int valid;
};

/// The group that holds the tile: a lane of one warp sums the padded sizes of its share of the
/// groups, the warp scans the sums, and the lane that holds the tile walks through its share again.
__device__ TileRows find_group(const RaggedGroups& groups, int64_t tile) {
  const int lane = threadIdx.x % detail::kWarp;
  const int share = (groups.num_groups + detail::kWarp - 1) / detail::kWarp;
  const int first = min(lane * share, groups.num_groups);
  const int last = min(first + share, groups.num_groups);
  const auto tiles_between = [](int begin, int end) { return (end - begin + kTile - 1) / kTile; };
  const int before = first > 0 ? groups.ends[first - 1] : 0;
  int tiles = 0, begin = before;
#pragma unroll 8
  for (int e = first; e < last; ++e) {
    const int end = groups.ends[e];
    tiles += tiles_between(begin, end);
    begin = end;
  }
  int64_t after = tiles;  // inclusive sum over the lanes
#pragma unroll
  for (int step = 1; step < detail::kWarp; step *= 2) {
    const int64_t other = __shfl_up_sync(detail::kFullMask, after, step);
    if (lane >= step) after += other;
  }
  const bool mine = tile >= after - tiles && tile < after;
  const unsigned holder = __ballot_sync(detail::kFullMask, mine);
  if (holder == 0) return {0, 0};
  int64_t source = 0;
  int valid = 0;
  if (mine) {
    auto skip = static_cast<int>(tile - (after - tiles));  // tiles up to the one looked for
    begin = before;
    for (int e = first; e < last; ++e) {
      const int end = groups.ends[e], size = tiles_between(begin, end);
      if (skip < size) {
        source = begin + int64_t{skip} * kTile;
        valid = static_cast<int>(min(end - source, int64_t{kTile}));
        break;
      }
      skip -= size;
      begin = end;
    }
  }
  const int from = __ffs(holder) - 1;
  return {__shfl_sync(detail::kFullMask, source, from),
          __shfl_sync(detail::kFullMask, valid, from)};
}

__device__ __forceinline__ TileRows find_rows(const QuantizeTiles& p, int64_t tile) {
  if (p.groups.num_groups == 0) {
    const int64_t row = tile * kTile;
    return {row, static_cast<int>(min(p.num_tokens - row, int64_t{kTile}))};
  }
  __shared__ TileRows found;
  if (threadIdx.x < detail::kWarp) {
    const TileRows rows = find_group(p.groups, tile);
    if (threadIdx.x == 0) found = rows;
  }
  __syncthreads();
  return found;
}

/// Blocks of a multiprocessor: without a bound the compiler keeps every number widened, three times
/// the registers.
template <typename T>
inline constexpr int kBlocks = std::is_same_v<T, float> ? 2 : 4;
/// Forms that are rarely used are not squeezed.
template <typename T, bool kVec>
inline constexpr int kTileBlocks = kVec ? kBlocks<T> : 2;

/// Codes take more registers to widen than both forms leave: each gets a kernel of its own.
template <typename T>
inline constexpr bool kBothAtOnce = !std::is_same_v<T, uint8_t>;

struct TileGrid {
  unsigned across, down;  // tiles
  int64_t padded;         // tokens of the transposed form
  unsigned ahead;         // tiles from a block's own to the one that it asks the cache for
  bool down_first;        // in which order blocks take them

  /// Row and column of tile `number`. Blocks that run at one time should write neighbouring pieces
  /// of memory: of rows, or of rows of the transposed form where it is written alone (1 and 2 % on
  /// an H200, where both forms lose 3 by it).
  __device__ __forceinline__ uint2 tile(unsigned number) const {
    return down_first ? make_uint2(number % down, number / down)
                      : make_uint2(number / across, number % across);
  }
};

/// How far ahead blocks ask the L2 cache for tiles, so that memory works while blocks reduce and
/// transpose: 1 to 8 % on an H200. Half as far gives most of it, twice as far makes BF16 1 % slower
/// than without.
constexpr int64_t kBytesAhead = 32 * 1024;  // of a multiprocessor

/// A thread's share of a tile, in memory.
template <typename T>
struct Share {
  const T* x = nullptr;
  int64_t row = 0;     // its first
  int rows = 0;        // that exist: ≤ 0 = none, ≥ kTileBand = all
  float scale = 0.0f;  // of codes: of row octet mod kTileBand
  TilePlace place = {};

  /// Asks for a later tile: a lane for a line or two of the rows of its 16; with groups perhaps a
  /// few rows beside it.
  __device__ __forceinline__ void ask_ahead(const QuantizeTiles& p, const TileGrid& grid) const {
    constexpr int kLine = 128 / static_cast<int>(sizeof(T));  // numbers of a line
    const int mine = detail::tile_octet() % kTileBand;
    const uint2 tile = grid.tile(blockIdx.x + grid.ahead);
    const int64_t at = row + int64_t{tile.x} * kTile - place.row0 + mine;
    if (at < 0 || at >= p.num_tokens) return;
    const int64_t column = int64_t{tile.y} * kTile;
    const T* later = static_cast<const T*>(p.x) + at * p.x_stride + column;
#pragma unroll
    for (int i = detail::tile_octet() / kTileBand; i < kTile / kLine; i += 16 / kTileBand) {
      if (column + i * kLine < p.width) detail::ptx::prefetch(later + i * kLine);
    }
  }
};

template <typename T>
__device__ __forceinline__ Share<T> share_of(const QuantizeTiles& p, const TileGrid& grid) {
  const uint2 tile = grid.tile(blockIdx.x);
  const TileRows rows = find_rows(p, tile.x);
  Share<T> share;
  share.place = {.row0 = int64_t{tile.x} * kTile,
                 .column0 = int64_t{tile.y} * kTile,
                 .rows = p.groups.num_groups == 0 ? rows.valid : kTile,
                 .width = p.width};
  const int first = detail::tile_first_row();
  share.row = rows.source + first;
  share.rows = share.place.columns_left() > 0 ? rows.valid - first : 0;
  share.x = static_cast<const T*>(p.x) + share.row * p.x_stride + share.place.column0 +
            8 * detail::tile_octet();
  if constexpr (std::is_same_v<T, uint8_t>) {
    const int mine = detail::tile_octet() % kTileBand;
    const float* scales =
        p.x_scales + share.place.column0 / kTile * p.x_scale_stride + rows.source + first;
    share.scale = mine < rows.valid - first ? scales[mine] : 0.0f;
  }
  return share;
}

template <typename T, bool kVec, bool kColumns>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T, kVec>)
    tiles_kernel(QuantizeTiles p, TileGrid grid) {
  const Share<T> share = share_of<T>(p, grid);
  TileValues<T> values;
  detail::load_share<kVec>(values, share.x, p.x_stride, share.rows,
                           kVec ? 8 : share.place.columns_left());
  share.ask_ahead(p, grid);
  if constexpr (std::is_same_v<T, uint8_t>) values.share_scales(share.scale);
  __shared__ std::conditional_t<kColumns, detail::ColumnShared, char> shared;
  if constexpr (kColumns) shared.prepare();
  if constexpr (!kColumns || kBothAtOnce<T>) {
    if (p.rows.data != nullptr) detail::emit_rows<kVec>(values, p.rows, p.rule, share.place);
  }
  if constexpr (kColumns) {
    detail::emit_columns(values, p.columns, p.rule, share.place, grid.padded, shared);
  }
}

/// Rows alone, without groups.
template <typename T, bool kVec>
__global__ void __launch_bounds__(detail::Strip::kThreads) rows_kernel(QuantizeTiles p) {
  const detail::Strip strip(p.num_tokens, p.width);
  const T* x = static_cast<const T*>(p.x) + strip.place.row0 * p.x_stride + strip.place.column0 +
               8 * detail::tile_octet();
  TileValues<T, detail::Strip::kRows> values;
  detail::load_share<kVec>(values, x, p.x_stride, strip.rows(), strip.place.columns_left());
  detail::emit_rows<kVec>(values, p.rows, p.rule, strip.place, 0);
}

template <typename T, bool kVec>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T>)
    blocks_kernel(QuantizeBlocks p, unsigned across) {
  __shared__ float shared[detail::kTileWarps];
  const int64_t row0 = int64_t{blockIdx.x / across} * kTile;
  const TilePlace place{
      .row0 = row0,
      .column0 = int64_t{blockIdx.x % across} * kTile,
      .rows = static_cast<int>(min(p.num_rows - row0, int64_t{kTile})),
      .width = p.width,
  };
  const int first = detail::tile_first_row();
  const int64_t left = place.columns_left();
  const int64_t column = place.column0 + 8 * detail::tile_octet();
  const T* x = static_cast<const T*>(p.x) + (row0 + first) * p.x_stride + column;
  TileValues<T> values;
#pragma unroll
  for (int j = 0; j < kTileBand; ++j) {
    values.template load<kVec>(j, x + j * p.x_stride, first + j < place.rows ? left : 0);
  }
  typename TileValues<T>::Row top;
  top.clear();
#pragma unroll
  for (int j = 0; j < kTileBand; ++j) top.raise(values.row(j));
  float amax = top.amax();
  amax = detail::warp_max(amax);
  if (threadIdx.x % detail::kWarp == 0) shared[threadIdx.x / detail::kWarp] = amax;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < detail::kTileWarps; ++w) amax = fmaxf(amax, shared[w]);
  const auto scale = detail::tile_scale(amax, p.rule);
  if (threadIdx.x == 0) {
    p.scales[row0 / kTile * p.scale_stride + place.column0 / kTile] = scale.scale;
  }
#pragma unroll
  for (int j = 0; j < kTileBand; ++j) {
    if (first + j >= place.rows) continue;
    const uint2 codes = detail::encode8([&](int e) { return values.at(j, e); }, scale.inverse);
    detail::store_codes<kVec>(p.data + (row0 + first + j) * p.width + column, codes, left);
  }
}

/// Calls fn with a null pointer of the source's type and a constant that says whether its accesses
/// are whole vectors.
template <typename Fn>
void dispatch_source(const char* name, DType dtype, bool vectorised, Fn&& fn) {
  const auto with = [&](auto* type) {
    if (vectorised) {
      fn(type, std::true_type());
    } else {
      fn(type, std::false_type());
    }
  };
  if (dtype == DType::kF8E4M3) return with(static_cast<uint8_t*>(nullptr));
  detail::dispatch_float(name, dtype, with);
}

template <typename... Pointers>
bool vectorised(int64_t width, int64_t stride, Pointers... pointers) {
  return width % 8 == 0 && stride % 8 == 0 && (detail::aligned16(pointers) && ...);
}

}  // namespace

void quantize_tiles(const QuantizeTiles& p, Stream stream) {
  const bool grouped = p.groups.num_groups > 0;
  const int64_t rows = grouped ? p.groups.padded_rows : p.num_tokens;
  if (rows == 0 || p.width == 0) return;
  const unsigned tiles = tile_grid("quantize_tiles", rows, p.width);
  const int64_t tile_bytes = int64_t{kTile} * kTile * size_of(p.dtype);
  TileGrid grid{
      .across = tiles_of(p.width),
      .down = tiles_of(rows),
      .padded = int64_t{tiles_of(rows)} * kTile,
      .ahead = static_cast<unsigned>(detail::multiprocessors() * kBytesAhead / tile_bytes),
      .down_first = false};
  const bool has_rows = p.rows.data != nullptr, has_columns = p.columns.data != nullptr;
  const cudaStream_t on = detail::cuda_stream(stream);
  dispatch_source("quantize_tiles", p.dtype, vectorised(p.width, p.x_stride, p.x, p.rows.data),
                  [&](auto* type, auto vec) {
                    using T = std::remove_pointer_t<decltype(type)>;
                    constexpr bool kVec = decltype(vec)::value;
                    if constexpr (!std::is_same_v<T, uint8_t>) {
                      if (!has_columns && !grouped) {
                        const auto strips = detail::strip_grid("quantize_tiles", rows, p.width);
                        rows_kernel<T, kVec><<<strips, detail::Strip::kThreads, 0, on>>>(p);
                        return;
                      }
                    }
                    const bool both = has_rows && has_columns && kBothAtOnce<T>;
                    if (has_columns) {
                      grid.down_first = !both;
                      tiles_kernel<T, kVec, true><<<tiles, kTileThreads, 0, on>>>(p, grid);
                    }
                    if (has_rows && !both) {
                      grid.down_first = false;
                      tiles_kernel<T, kVec, false><<<tiles, kTileThreads, 0, on>>>(p, grid);
                    }
                  });
  detail::check_launch("quantize_tiles");
}

void quantize_blocks(const QuantizeBlocks& p, Stream stream) {
  if (p.num_rows == 0 || p.width == 0) return;
  const unsigned grid = tile_grid("quantize_blocks", p.num_rows, p.width);
  const unsigned across = tiles_of(p.width);
  const cudaStream_t on = detail::cuda_stream(stream);
  const bool vec = vectorised(p.width, p.x_stride, p.x, p.data);
  detail::dispatch_float("quantize_blocks", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (vec) {
      blocks_kernel<T, true><<<grid, kTileThreads, 0, on>>>(p, across);
    } else {
      blocks_kernel<T, false><<<grid, kTileThreads, 0, on>>>(p, across);
    }
  });
  detail::check_launch("quantize_blocks");
}

}  // namespace dsv3::kernels::cuda
