#pragma once

// Headers of ours name tensors without including LibTorch; sources include ATen/core/Tensor.h.
namespace at {
class Tensor;
}
