#pragma once

#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/loss.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "kernels/rope.h"
#include "kernels/routing.h"

// The table of contents of the GPU and CPU work outside LibTorch: one struct and one function per
// operation, raw pointers, no LibTorch. Families: elementwise (norm, SwiGLU, embedding), rope,
// quantize (FP8 tiles, the latent cache), routing (router, permutation), loss (cross-entropy),
// optimizer (AdamW, norms, random numbers).
