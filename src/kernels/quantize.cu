// FP8 tiles on the device: a block of 256 threads per 128×128 numbers, all of its loads in flight
// before the first use (detail/fp8_tile.cuh). Bytes for BF16: 2·T·K read once, T·K written per
// form; re-quantisation T·K and T·K; dequantisation T·K and 2·T·K. With groups every block looks up
// its own: the ends of up to 1024 groups, scanned by one warp.

#include "kernels/detail/fp8_tile.cuh"

namespace dsv3::kernels::cuda {
namespace {

using detail::kTile;
using detail::kTileBand;
using detail::kTileThreads;
using detail::TilePlace;
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

template <typename T, bool kVec, bool kColumns>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T>)
    tiles_kernel(QuantizeTiles p, unsigned across, int64_t padded) {
  const int64_t tile = blockIdx.x / across;
  const TileRows rows = find_rows(p, tile);
  const TilePlace place{
      .row0 = tile * kTile,
      .column0 = int64_t{blockIdx.x % across} * kTile,
      .rows = p.groups.num_groups == 0 ? rows.valid : kTile,
      .width = p.width,
  };
  const int first = detail::tile_first_row();
  const int64_t left = place.columns_left();
  const T* x = static_cast<const T*>(p.x) + (rows.source + first) * p.x_stride + place.column0 +
               8 * detail::tile_octet();
  TileValues<T> values;
#pragma unroll
  for (int j = 0; j < kTileBand; ++j) {
    values.template load<kVec>(j, x + j * p.x_stride, first + j < rows.valid ? left : 0);
  }
  if constexpr (std::is_same_v<T, uint8_t>) {
    const float* scales =
        p.x_scales + place.column0 / kTile * p.x_scale_stride + rows.source + first;
#pragma unroll
    for (int j = 0; j < kTileBand; ++j) {
      values.scale[j] = first + j < rows.valid ? scales[j] : 0.0f;
    }
  }
  if (p.rows.data != nullptr) detail::emit_rows<kVec>(values, p.rows, p.rule, place);
  if constexpr (kColumns) {
    __shared__ detail::ColumnShared<> shared;
    detail::emit_columns(values, p.columns, p.rule, place, padded, shared);
  }
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
  const auto scale = kernels::detail::tile_scale(amax, p.rule);
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

/// Up to `left` numbers of a row.
template <bool kVec, typename T>
__device__ __forceinline__ void store_row(T* y, const float (&v)[8], int64_t left) {
  if constexpr (kVec) {
    detail::Packed<T> packed;
    packed.set(v);
    if (left > 0) packed.store_once(y);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < left) y[e] = detail::from_float<T>(v[e]);
    }
  }
}

/// kRows and kBlocks.
template <typename T, bool kVec>
__global__ void __launch_bounds__(kTileThreads) dequantize_kernel(Dequantize p, unsigned across) {
  const int64_t row0 = int64_t{blockIdx.x / across} * kTile;
  const int64_t tile = blockIdx.x % across;
  const TilePlace place{
      .row0 = row0,
      .column0 = tile * kTile,
      .rows = static_cast<int>(min(p.num_tokens - row0, int64_t{kTile})),
      .width = p.width,
  };
  const int first = detail::tile_first_row();
  const int64_t left = place.columns_left();
  const int64_t offset = (row0 + first) * p.width + place.column0 + 8 * detail::tile_octet();
  TileValues<uint8_t> values;
#pragma unroll
  for (int j = 0; j < kTileBand; ++j) {
    const bool exists = first + j < place.rows;
    values.template load<kVec>(j, p.data + offset + j * p.width, exists ? left : 0);
  }
  // Two lanes load a row's scale, and pass it on to the sixteen of the row.
  const int mine = first + detail::tile_octet() / 2;
  const float* from = p.tiling == Fp8Tiling::kRows
                          ? p.scales + tile * p.scale_stride + row0 + mine
                          : p.scales + row0 / kTile * p.scale_stride + tile;
  const float scale = mine < place.rows ? *from : 0.0f;
#pragma unroll
  for (int j = 0; j < kTileBand; ++j) {
    values.scale[j] = __shfl_sync(detail::kFullMask, scale, 2 * j, 16);
  }
#pragma unroll
  for (int j = 0; j < kTileBand; ++j) {
    if (first + j >= place.rows) continue;
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = values.at(j, e);
    store_row<kVec>(static_cast<T*>(p.y) + offset + j * p.width, v, left);
  }
}

/// kColumns: the way of emit_columns backwards.
template <typename T, bool kVec>
__global__ void __launch_bounds__(kTileThreads)
    dequantize_columns_kernel(Dequantize p, unsigned across) {
  __shared__ uint4 codes[kTile][8];
  const int64_t row0 = int64_t{blockIdx.x / across} * kTile;
  const TilePlace place{
      .row0 = row0,
      .column0 = int64_t{blockIdx.x % across} * kTile,
      .rows = static_cast<int>(min(p.num_tokens - row0, int64_t{kTile})),
      .width = p.width,
  };
  const int lane = threadIdx.x % detail::kWarp, warp = threadIdx.x / detail::kWarp;
#pragma unroll
  for (int i = 0; i < kTile * 8 / kTileThreads; ++i) {
    const int octet = lane / 8 + 4 * i, column = 8 * octet + warp, pair = lane % 8;
    uint4 part = make_uint4(0, 0, 0, 0);
    if (place.column0 + column < p.width) {
      const uint8_t* from = p.data + (place.column0 + column) * p.data_stride + row0 + 16 * pair;
      part = __ldcs(reinterpret_cast<const uint4*>(from));
    }
    if (octet % 2 != 0) part = make_uint4(part.z, part.w, part.x, part.y);
    codes[column][detail::swizzle(column, pair)] = part;
  }
  __syncthreads();
  const int octet = detail::tile_octet(), first = detail::tile_first_row();
  const int64_t left = place.columns_left();
  uint2 mine[8];
  float scales[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    mine[e] = reinterpret_cast<const uint2*>(codes[8 * octet + e])[first / 8 ^ octet];
    const int64_t column = place.column0 + 8 * octet + e;
    scales[e] = e < left ? p.scales[row0 / kTile * p.scale_stride + column] : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < kTileBand; ++j) {
    if (first + j >= place.rows) continue;
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = __fmul_rn(detail::decode(mine[e], j), scales[e]);
    store_row<kVec>(static_cast<T*>(p.y) + (row0 + first + j) * p.width + place.column0 + 8 * octet,
                    v, left);
  }
}

unsigned tiles_of(int64_t size) {
  return static_cast<unsigned>((size + kTile - 1) / kTile);
}

/// A grid of one block per tile; throws when there are more than a grid holds.
unsigned tile_grid(const char* name, int64_t rows, int64_t width) {
  const int64_t tiles = int64_t{tiles_of(rows)} * tiles_of(width);
  if (tiles > INT32_MAX) kernels::detail::raise_invalid(name, "more than 2^31 tiles of 128×128");
  return static_cast<unsigned>(tiles);
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
  const unsigned grid = tile_grid("quantize_tiles", rows, p.width), across = tiles_of(p.width);
  const int64_t padded = int64_t{tiles_of(rows)} * kTile;
  const cudaStream_t on = detail::cuda_stream(stream);
  dispatch_source("quantize_tiles", p.dtype, vectorised(p.width, p.x_stride, p.x, p.rows.data),
                  [&](auto* type, auto vec) {
                    using T = std::remove_pointer_t<decltype(type)>;
                    constexpr bool kVec = decltype(vec)::value;
                    if (p.columns.data != nullptr) {
                      tiles_kernel<T, kVec, true><<<grid, kTileThreads, 0, on>>>(p, across, padded);
                    } else {
                      tiles_kernel<T, kVec, false>
                          <<<grid, kTileThreads, 0, on>>>(p, across, padded);
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

void dequantize(const Dequantize& p, Stream stream) {
  if (p.num_tokens == 0 || p.width == 0) return;
  const unsigned grid = tile_grid("dequantize", p.num_tokens, p.width), across = tiles_of(p.width);
  const cudaStream_t on = detail::cuda_stream(stream);
  const bool columns = p.tiling == Fp8Tiling::kColumns;
  const bool vec = p.width % 8 == 0 && detail::aligned16(p.data) && detail::aligned16(p.y);
  detail::dispatch_float("dequantize", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (columns && vec) {
      dequantize_columns_kernel<T, true><<<grid, kTileThreads, 0, on>>>(p, across);
    } else if (columns) {
      dequantize_columns_kernel<T, false><<<grid, kTileThreads, 0, on>>>(p, across);
    } else if (vec) {
      dequantize_kernel<T, true><<<grid, kTileThreads, 0, on>>>(p, across);
    } else {
      dequantize_kernel<T, false><<<grid, kTileThreads, 0, on>>>(p, across);
    }
  });
  detail::check_launch("dequantize");
}

}  // namespace dsv3::kernels::cuda
