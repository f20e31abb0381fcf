#include "ops/range.h"

#include <ATen/record_function.h>

#include <string_view>
#include <utility>

namespace dsv3::ops {
namespace {

thread_local std::string current;  // path of the innermost range on this thread

/// Replaces the component `from` of a path, where it holds it.
void replace_component(std::string& path, std::string_view from, std::string_view to) {
  const size_t at = path.find(from);
  if (at != std::string::npos) path.replace(at, from.size(), to);
}

}  // namespace

namespace detail {
std::atomic<bool> ranges_on{false};
}

struct Range::State {
  std::string outer;
  at::RecordFunction record{at::RecordScope::USER_SCOPE};
};

void record_ranges(bool on) {
  detail::ranges_on.store(on, std::memory_order_relaxed);
}

void Range::open_inside(const std::string& name) {
  open(current.empty() ? name : current + "/" + name);
}

void Range::open(std::string path) {
  state_ = new State;
  state_->outer = std::exchange(current, std::move(path));
  if (state_->record.isActive()) state_->record.before(std::string_view(current));
}

void Range::close() {
  current = std::move(state_->outer);
  delete state_;
}

Range::Path Range::backward_path() {
  Path path;
  if (!detail::ranges_on.load(std::memory_order_relaxed)) return path;
  path.text = current;
  replace_component(path.text, "/forward/", "/backward/");
  replace_component(path.text, "/recompute/", "/");  // forward again, within the backward pass
  return path;
}

}  // namespace dsv3::ops
