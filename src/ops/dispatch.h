#pragma once

#include <c10/util/ArrayRef.h>

#include "base/dtype.h"
#include "base/stream.h"
#include "base/tensor_fwd.h"

// Between tensors and raw pointers: what every operator asks before it calls its kernel. `op` is
// the operator's name and `name` the argument's: they begin every message, as in
// "[rms_norm] weight: expected shape [7168], got [4096]".

namespace dsv3::ops {

/// Our name for the tensor's element type; std::invalid_argument where we have none.
DType dtype_of(const at::Tensor& tensor, const char* op, const char* name);

/// Where work on this tensor is queued: the host, or the current CUDA stream of its device. Throws
/// std::invalid_argument for another kind of device, and for a CUDA device that is not the current
/// one, where kernels are launched.
Stream stream_of(const at::Tensor& tensor);

/// The kernels take FP32 and BF16; float64 goes to the reference body.
bool has_kernel(const at::Tensor& tensor);

/// Throws std::invalid_argument unless the tensor is defined and has this shape; -1 = any size.
void check_shape(const at::Tensor& tensor, const char* op, const char* name,
                 c10::IntArrayRef expected);

/// Throws std::invalid_argument unless the tensor is FP32, BF16 or FP64: what operators with a
/// kernel and a reference take.
void check_number(const at::Tensor& tensor, const char* op, const char* name);

/// Throws std::invalid_argument unless `tensor` has the dtype and the device of `like`.
void check_like(const at::Tensor& tensor, const char* op, const char* name, const at::Tensor& like,
                const char* like_name);

/// Throws std::invalid_argument unless the tensor is int32 and lives where `like` does.
void check_int32(const at::Tensor& tensor, const char* op, const char* name,
                 const at::Tensor& like);

/// Throws std::invalid_argument unless `bucket`, where a kernel adds a weight's gradient, has this
/// shape, is contiguous and lives where `like` does.
void check_bucket(const at::Tensor& bucket, const char* op, c10::IntArrayRef expected,
                  const at::Tensor& like);

/// The tensor itself when its last dim is contiguous, else a contiguous copy.
at::Tensor rows_contiguous(const at::Tensor& tensor);

}  // namespace dsv3::ops
