#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace dsv3::detail {

/// An uninitialised tensor on the host, [numel]. `pinned`: in page-locked memory, so that copies
/// from the GPU run asynchronously at the bus's full speed; where the system grants none, ordinary
/// memory is taken and copies are slower. Page-locked memory is taken at its exact size (LibTorch's
/// own cache rounds up to powers of two) and given back with the tensor.
at::Tensor host_tensor(int64_t numel, at::ScalarType type, bool pinned);

/// Bytes of host memory that can still be taken without swapping (MemAvailable of /proc/meminfo);
/// the largest number where that is unknown.
uint64_t available_host_bytes();

}  // namespace dsv3::detail
