#include "data/compressed_input.h"

#include <zlib.h>
#include <zstd.h>

#include <cerrno>
#include <cstring>
#include <new>

#include "base/error.h"

namespace dsv3 {
namespace {

constexpr size_t kBlock = size_t{1} << 18;

}  // namespace

struct CompressedInput::Gzip {
  z_stream stream{};
  Gzip() {
    if (inflateInit2(&stream, 15 + 16) != Z_OK) throw std::bad_alloc();  // 16: gzip wrapping only
  }
  ~Gzip() { inflateEnd(&stream); }
};

struct CompressedInput::Zstd {
  ZSTD_DStream* stream = ZSTD_createDStream();
  Zstd() {
    if (stream == nullptr) throw std::bad_alloc();
  }
  ~Zstd() { ZSTD_freeDStream(stream); }
};

CompressedInput::CompressedInput(std::filesystem::path path) : path_(std::move(path)) {
  if (std::filesystem::is_directory(path_))
    throw IoError(fmt::format("cannot read {}: it is a directory", path_.string()));
  file_ = std::fopen(path_.c_str(), "rbe");
  if (file_ == nullptr)
    throw IoError(fmt::format("cannot open {}: {}", path_.string(), std::strerror(errno)));
  try {
    refill();
    if (input_.starts_with("\x1f\x8b")) gzip_ = std::make_unique<Gzip>();
    if (input_.starts_with("\x28\xb5\x2f\xfd")) zstd_ = std::make_unique<Zstd>();
  } catch (...) {
    std::fclose(file_);
    throw;
  }
}

CompressedInput::~CompressedInput() {
  std::fclose(file_);
}

void CompressedInput::broken(const char* kind, const std::string& what) const {
  throw IoError(fmt::format("{}: broken {} file near byte {}: {}", path_.string(), kind,
                            input_read_ - static_cast<int64_t>(input_.size() - at_), what));
}

/// Reads the next block of the file where the last one is used up; false at the end.
bool CompressedInput::refill() {
  if (at_ < input_.size()) return true;
  input_.resize(kBlock);
  at_ = 0;
  const size_t count = std::fread(input_.data(), 1, kBlock, file_);
  const bool failed = count < kBlock && std::ferror(file_) != 0;
  input_.resize(count);
  if (failed)
    throw IoError(fmt::format("cannot read {}: {}", path_.string(), std::strerror(errno)));
  input_read_ += static_cast<int64_t>(count);
  return count > 0;
}

bool CompressedInput::read(std::string& out) {
  if (gzip_) return inflate_gzip(out);
  if (zstd_) return inflate_zstd(out);
  if (!refill()) return false;
  out.append(input_, at_);
  at_ = input_.size();
  return true;
}

bool CompressedInput::inflate_gzip(std::string& out) {
  // A full output block may leave data inside the decoder after the input is used up.
  if (!refill() && !in_member_) return false;
  z_stream& stream = gzip_->stream;
  stream.next_in = reinterpret_cast<Bytef*>(input_.data() + at_);
  stream.avail_in = static_cast<uInt>(input_.size() - at_);
  const size_t before = out.size();
  out.resize(before + kBlock);
  stream.next_out = reinterpret_cast<Bytef*>(out.data() + before);
  stream.avail_out = kBlock;
  const int result = inflate(&stream, Z_NO_FLUSH);
  at_ = input_.size() - stream.avail_in;
  out.resize(before + kBlock - stream.avail_out);
  if (result == Z_BUF_ERROR) broken("gzip", "it ends too early");
  if (result != Z_OK && result != Z_STREAM_END)
    broken("gzip", stream.msg != nullptr ? stream.msg : "cannot be decompressed");
  in_member_ = result != Z_STREAM_END;
  if (result == Z_STREAM_END) inflateReset(&stream);
  return true;
}

bool CompressedInput::inflate_zstd(std::string& out) {
  if (!refill() && !in_member_) return false;
  ZSTD_inBuffer in{input_.data(), input_.size(), at_};
  const size_t before = out.size();
  out.resize(before + kBlock);
  ZSTD_outBuffer target{out.data() + before, kBlock, 0};
  const size_t result = ZSTD_decompressStream(zstd_->stream, &target, &in);
  const bool stuck = in.pos == at_ && target.pos == 0;
  at_ = in.pos;
  out.resize(before + target.pos);
  if (ZSTD_isError(result)) broken("zstd", ZSTD_getErrorName(result));
  if (result != 0 && stuck) broken("zstd", "it ends too early");
  in_member_ = result != 0;
  return true;
}

}  // namespace dsv3
