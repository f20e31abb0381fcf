// The embedding table on the device.
//
// Backward: a stable radix sort brings the tokens of one id together, in token order. Blocks take
// chunks of 32 sorted tokens (times 1024 columns), sum each run of equal ids in FP32, and add runs
// that lie within the chunk to the table's gradient. What crosses a chunk's border goes to scratch:
// slot 0 the share of a run that began before the chunk, slot 1 of one that begins in it and goes
// on. A second kernel lets the chunk where such a run begins add the shares: eight rows of threads
// take every eighth share each and are added in order, so that an id repeated thousands of times is
// no chain of thousands of loads. No atomics, nothing meets the host, the same bits every time.

#include <algorithm>
#include <cub/device/device_radix_sort.cuh>

#include "kernels/detail/expert_rows.cuh"
#include "kernels/detail/launch.cuh"
#include "kernels/detail/vector.cuh"
#include "kernels/elementwise.h"

namespace dsv3::kernels::cuda {
namespace {

using detail::kVector;

constexpr int kChunk = 32;  // sorted tokens per block
constexpr int kThreads = 128;
constexpr int kTokens = 2;  // of a thread of the forward
constexpr int kBatch = 4;   // of one of the backward, whose loads are in flight together
constexpr int kJoinLanes = 32, kJoinRows = 8;

constexpr int64_t aligned(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}

/// The scratch, cut up.
struct Scratch {
  int32_t* tokens;      // [T] 0, 1, 2, …
  int32_t* sorted_ids;  // [T]
  int32_t* order;       // [T] the token of each sorted id
  float* shares;        // [chunks, 2, D]
  void* sort;
  size_t sort_bytes;
  int64_t total;
};

int id_bits(int64_t vocab) {
  int bits = 1;
  while (bits < 31 && (int64_t{1} << bits) < vocab) ++bits;
  return bits;
}

void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) {
    kernels::detail::raise_cuda("embedding_backward", "sort failed", cudaGetErrorString(error));
  }
}

Scratch cut_scratch(void* base, int64_t num_tokens, int64_t vocab, int64_t hidden) {
  Scratch s{};
  auto* at = static_cast<char*>(base);
  const auto take = [&](int64_t bytes) {
    char* begin = at;
    if (base != nullptr) at += aligned(bytes);
    s.total += aligned(bytes);
    return begin;
  };
  const int64_t ints = num_tokens * static_cast<int64_t>(sizeof(int32_t));
  const int64_t chunks = (num_tokens + kChunk - 1) / kChunk;
  s.tokens = reinterpret_cast<int32_t*>(take(ints));
  s.sorted_ids = reinterpret_cast<int32_t*>(take(ints));
  s.order = reinterpret_cast<int32_t*>(take(ints));
  s.shares = reinterpret_cast<float*>(take(chunks * 2 * hidden * sizeof(float)));
  check_cuda(cub::DeviceRadixSort::SortPairs(nullptr, s.sort_bytes, s.tokens, s.sorted_ids,
                                             s.tokens, s.order, static_cast<int>(num_tokens), 0,
                                             id_bits(vocab)));
  s.sort = take(static_cast<int64_t>(s.sort_bytes));
  return s;
}

/// A thread copies a word of kTokens rows: small blocks, in order, keep the places that memory
/// works at close together. Zeros for an id that is out of range.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(EmbeddingForward p, int words, unsigned across) {
  const int column = static_cast<int>(blockIdx.x % across * kThreads + threadIdx.x);
  const int64_t first = int64_t{blockIdx.x / across} * kTokens;
  if (column >= words) return;
  Word word[kTokens] = {};
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const int64_t id = first + j < p.num_tokens ? p.ids[first + j] : -1;
    if (id >= 0 && id < p.vocab) word[j] = static_cast<const Word*>(p.table)[id * words + column];
  }
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    if (first + j >= p.num_tokens) continue;
    static_cast<Word*>(p.y)[(first + j) * words + column] = word[j];
  }
}

__global__ void count_up_kernel(int32_t* tokens, int64_t num_tokens) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < num_tokens) tokens[i] = static_cast<int32_t>(i);
}

/// grid (chunks, column tiles).
template <typename T, typename G, int kVec>
__global__ void __launch_bounds__(kThreads) sum_chunk_kernel(EmbeddingBackward p, Scratch s) {
  __shared__ int32_t ids[kChunk + 2];  // with one neighbour on either side, -1 beyond the ends
  __shared__ int32_t tokens[kChunk];
  const int64_t begin = int64_t{blockIdx.x} * kChunk;
  const int count = static_cast<int>(min(int64_t{kChunk}, p.num_tokens - begin));
  for (int i = threadIdx.x; i < kChunk + 2; i += kThreads) {
    const int64_t at = begin + i - 1;
    ids[i] = at >= 0 && at < p.num_tokens ? s.sorted_ids[at] : -1;
    if (i < count) tokens[i] = s.order[begin + i];
  }
  __syncthreads();
  const int64_t column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kVec;
  if (column >= p.hidden) return;
  const T* const dy = static_cast<const T*>(p.dy) + column;
  G* const table = static_cast<G*>(p.dtable) + column;
  float* const share = s.shares + int64_t{blockIdx.x} * 2 * p.hidden + column;
  float sum[kVec] = {};
  for (int first = 0; first < count; first += kBatch) {
    float v[kBatch][kVec], row[kBatch][kVec];
    bool to_table[kBatch];  // a run ends here that lies within the chunk: its row is loaded too
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j;
      to_table[j] = false;
      if (i >= count) continue;
      const int32_t id = ids[i + 1];
      to_table[j] = id != ids[0] && id != ids[i + 2] && id >= 0 && id < p.vocab;
      detail::load_n<kVec>(dy + int64_t{tokens[i]} * p.hidden, v[j]);
      if (to_table[j]) detail::load_n<kVec>(table + id * p.hidden, row[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j;
      if (i >= count) break;
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum[e] += v[j][e];
      const int32_t id = ids[i + 1];
      const bool goes_on = ids[i + 2] == id;
      if (goes_on && i + 1 < count) continue;
      if (to_table[j]) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) row[j][e] += sum[e];
        detail::store_n<kVec>(table + id * p.hidden, row[j]);
      } else if (id == ids[0]) {
        detail::store_n<kVec>(share, sum);
      } else if (goes_on) {
        detail::store_n<kVec>(share + p.hidden, sum);
      }
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum[e] = 0.0f;
    }
  }
}

/// The last of the chunks from `chunk` on (where one begins with `id`) that begin with `id`.
__device__ int64_t last_of_run(const Scratch& s, int64_t num_tokens, int64_t chunk, int32_t id) {
  const auto goes_on = [&](int64_t c) {
    return c * kChunk < num_tokens && s.sorted_ids[c * kChunk] == id;
  };
  int64_t step = 1;
  while (goes_on(chunk + step)) {
    chunk += step;
    step *= 2;
  }
  while (step > 1) {
    step /= 2;
    if (goes_on(chunk + step)) chunk += step;
  }
  return chunk;
}

template <int kVec, typename G>
__device__ __forceinline__ void add_to_row(G* row, const float (&sum)[kVec]) {
  float v[kVec];
  detail::load_n<kVec>(row, v);
#pragma unroll
  for (int e = 0; e < kVec; ++e) v[e] += sum[e];
  detail::store_n<kVec>(row, v);
}

/// grid (chunks, column tiles), blockDim (kJoinLanes, kJoinRows): the chunk in which a crossing run
/// begins adds the run's shares.
template <typename G, int kVec>
__global__ void __launch_bounds__(kJoinLanes* kJoinRows)
    join_chunks_kernel(EmbeddingBackward p, Scratch s) {
  __shared__ __align__(16) float parts[kJoinRows][kJoinLanes * kVec];
  const int64_t begin = int64_t{blockIdx.x} * kChunk, end = begin + kChunk;
  if (end >= p.num_tokens) return;
  const int32_t before = begin > 0 ? s.sorted_ids[begin - 1] : -1;
  const int32_t id = s.sorted_ids[end - 1], next = s.sorted_ids[end];
  if (next != id || before == id || id < 0 || id >= p.vocab) return;  // or it began earlier
  const int64_t last = last_of_run(s, p.num_tokens, int64_t{blockIdx.x} + 1, id);
  const int64_t column = (int64_t{blockIdx.y} * kJoinLanes + threadIdx.x) * kVec;
  const bool inside = column < p.hidden;
  float sum[kVec] = {};
  if (inside) {
    const float* const shares = s.shares + column;
    if (threadIdx.y == 0) {
      detail::load_n<kVec>(shares + (blockIdx.x * int64_t{2} + 1) * p.hidden, sum);
    }
#pragma unroll 4
    for (int64_t c = int64_t{blockIdx.x} + 1 + threadIdx.y; c <= last; c += kJoinRows) {
      float v[kVec];
      detail::load_n<kVec>(shares + c * 2 * p.hidden, v);
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum[e] += v[e];
    }
    detail::store_n<kVec>(&parts[threadIdx.y][threadIdx.x * kVec], sum);
  }
  __syncthreads();
  if (!inside || threadIdx.y != 0) return;
  for (int row = 1; row < kJoinRows; ++row) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum[e] += parts[row][threadIdx.x * kVec + e];
  }
  add_to_row<kVec>(static_cast<G*>(p.dtable) + id * p.hidden + column, sum);
}

template <typename T, typename G, int kVec>
void launch_backward(const EmbeddingBackward& p, const Scratch& s, cudaStream_t stream) {
  const int64_t chunks = (p.num_tokens + kChunk - 1) / kChunk;
  const int64_t tiles = (p.hidden + kThreads * kVec - 1) / (kThreads * kVec);
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(tiles));
  sum_chunk_kernel<T, G, kVec><<<grid, kThreads, 0, stream>>>(p, s);
  const int64_t join_tiles = (p.hidden + kJoinLanes * kVec - 1) / (kJoinLanes * kVec);
  const dim3 join_grid(static_cast<unsigned>(chunks), static_cast<unsigned>(join_tiles));
  join_chunks_kernel<G, kVec><<<join_grid, dim3(kJoinLanes, kJoinRows), 0, stream>>>(p, s);
}

}  // namespace

int64_t embedding_backward_scratch(int64_t num_tokens, int64_t vocab, int64_t hidden) {
  return cut_scratch(nullptr, num_tokens, vocab, hidden).total;
}

void embedding_forward(const EmbeddingForward& p, Stream stream) {
  if (p.num_tokens == 0 || p.hidden == 0) return;
  const int64_t row_bytes = p.hidden * size_of(p.dtype);
  const bool aligned = detail::aligned16(p.table) && detail::aligned16(p.y);
  detail::dispatch_word(row_bytes, aligned, [&](auto* type) {
    using Word = std::remove_pointer_t<decltype(type)>;
    const auto words = static_cast<int>(row_bytes / static_cast<int64_t>(sizeof(Word)));
    const auto across = static_cast<unsigned>((words + kThreads - 1) / kThreads);
    const auto blocks = static_cast<unsigned>((p.num_tokens + kTokens - 1) / kTokens) * across;
    forward_kernel<Word><<<blocks, kThreads, 0, detail::cuda_stream(stream)>>>(p, words, across);
  });
  detail::check_launch("embedding");
}

void embedding_backward(const EmbeddingBackward& p, Stream stream) {
  if (p.num_tokens == 0 || p.hidden == 0) return;
  const cudaStream_t on = detail::cuda_stream(stream);
  Scratch s = cut_scratch(p.scratch, p.num_tokens, p.vocab, p.hidden);
  count_up_kernel<<<static_cast<unsigned>((p.num_tokens + 255) / 256), 256, 0, on>>>(s.tokens,
                                                                                     p.num_tokens);
  check_cuda(cub::DeviceRadixSort::SortPairs(s.sort, s.sort_bytes, p.ids, s.sorted_ids, s.tokens,
                                             s.order, static_cast<int>(p.num_tokens), 0,
                                             id_bits(p.vocab), on));
  const bool vectorised = p.hidden % kVector == 0 && detail::aligned16(p.dy) &&
                          detail::aligned16(p.dtable) && detail::aligned16(s.shares);
  detail::dispatch_float("embedding_backward", p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    detail::dispatch_float("embedding_backward", p.dtable_dtype, [&](auto* grad) {
      using G = std::remove_pointer_t<decltype(grad)>;
      if (vectorised) {
        launch_backward<T, G, kVector>(p, s, on);
      } else {
        launch_backward<T, G, 1>(p, s, on);
      }
    });
  });
  detail::check_launch("embedding_backward");
}

}  // namespace dsv3::kernels::cuda
