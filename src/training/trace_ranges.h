#pragma once

#include <filesystem>

namespace dsv3 {

/// Adds to a Chrome trace of Kineto's a process "dsv3" with a track for each CPU thread and each
/// GPU stream that our ranges (ops/range.h) ran on: step, micro-batch, forward or backward, layer,
/// module and operator as nested events of the category "dsv3". A level's event spans everything
/// below it that follows without another in between; so layers appear in the backward pass too,
/// whose operators autograd calls one by one, and on the GPU, where Kineto shows the innermost
/// range only. Throws IoError when the file is no trace.
void add_range_tracks(const std::filesystem::path& trace);

}  // namespace dsv3
