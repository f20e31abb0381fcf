#include "training/bad_numbers.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "kernels/optimizer.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"

namespace dsv3 {
namespace {

constexpr int64_t kGradient = 0, kWeight = 1, kCount = 0, kFirst = 1;

void clear(const at::Tensor& slot) {
  slot.select(1, kCount).zero_();
  slot.select(1, kFirst).fill_(std::numeric_limits<int64_t>::max());
}

}  // namespace

std::string piece_name(const ParameterSpec& spec, int64_t index) {
  const bool stacked = spec.shape.size() == 3;
  const int64_t rows = stacked ? spec.shape[1] : spec.shape[0];
  const int64_t row =
      index / (spec.numel() / std::max<int64_t>(1, rows * (stacked ? spec.shape[0] : 1)));
  for (const auto& piece : spec.pieces) {
    const int64_t base = piece.index >= 0 ? piece.index * rows : 0;
    if (row >= base + piece.row_begin && row < base + piece.row_end) return piece.name;
  }
  return spec.name;
}

BadNumbers::BadNumbers(const ParameterSet& parameters) : parameters_(parameters) {
  const ops::NoRecord guard;
  const auto& buckets = parameters.buckets();
  begin_.push_back(0);
  for (size_t b = 0; b < buckets.size(); ++b) {
    const auto first = static_cast<std::ptrdiff_t>(order_.size());
    for (const auto& parameter : parameters.parameters())
      if (parameter.bucket == static_cast<int64_t>(b)) order_.push_back(&parameter);
    std::sort(order_.begin() + first, order_.end(),
              [](const auto* x, const auto* y) { return x->offset < y->offset; });
    begin_.push_back(static_cast<int64_t>(order_.size()));
  }
  const auto count = static_cast<int64_t>(order_.size());
  const at::Tensor starts = at::empty({count}, at::kLong);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t offset = order_[static_cast<size_t>(i)]->offset;
    DSV3_CHECK(offset % kernels::kNonFiniteTile == 0, "a parameter starts at {}", offset);
    starts.data_ptr<int64_t>()[i] = offset;
  }
  const at::Device device = buckets.front().values.device();
  starts_ = starts.to(device);
  evidence_ = at::empty({2, 2, 2, count}, at::TensorOptions(at::kLong).device(device));
  for (const int64_t step : {0, 1}) clear(slot(step));
}

at::Tensor BadNumbers::slot(int64_t step) const {
  return evidence_.select(0, step % 2);
}

void BadNumbers::locate(const at::Tensor& skip, int64_t step) {
  const ops::NoRecord guard;
  const auto& buckets = parameters_.buckets();
  for (size_t b = 0; b < buckets.size(); ++b) {
    for (const int64_t kind : {kGradient, kWeight}) {
      const at::Tensor& flat = kind == kGradient ? buckets[b].grads : buckets[b].values;
      const at::Tensor found = slot(step).select(0, kind);
      kernels::locate_non_finite({.size = flat.numel(),
                                  .dtype = ops::dtype_of(flat, "locate_non_finite", "x"),
                                  .x = flat.const_data_ptr(),
                                  .num_ranges = begin_[b + 1] - begin_[b],
                                  .starts = starts_.const_data_ptr<int64_t>() + begin_[b],
                                  .only_if = skip.const_data_ptr<int32_t>(),
                                  .counts = found.select(0, kCount).data_ptr<int64_t>() + begin_[b],
                                  .first = found.select(0, kFirst).data_ptr<int64_t>() + begin_[b]},
                                 ops::stream_of(flat));
    }
  }
}

std::vector<BadTensor> BadNumbers::take(int64_t step) {
  const ops::NoRecord guard;
  const at::Tensor found = slot(step).cpu().clone();  // on the CPU, cpu() is the slot itself
  clear(slot(step));
  // Place of each parameter in its declaration, which is the order of the forward pass.
  std::vector<std::pair<const Parameter*, int64_t>> declared;
  for (const auto& parameter : parameters_.parameters()) {
    const auto at = std::ranges::find(order_, &parameter);
    if (at != order_.end()) declared.emplace_back(&parameter, at - order_.begin());
  }
  std::vector<BadTensor> bad;
  for (const bool weight : {true, false}) {
    const at::Tensor part = found.select(0, weight ? kWeight : kGradient);
    const auto* counts = part.const_data_ptr<int64_t>();
    const auto* first = counts + order_.size();
    for (const auto& [parameter, i] : declared) {
      if (counts[i] == 0) continue;
      bad.push_back({.name = piece_name(parameter->spec, first[i]),
                     .layer = parameter->spec.layer,
                     .weight = weight,
                     .count = counts[i]});
    }
    std::ranges::reverse(declared);
  }
  return bad;
}

}  // namespace dsv3
