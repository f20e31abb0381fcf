#include "data/tokenize.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include "base/error.h"
#include "data/shard.h"

namespace dsv3 {
namespace {

constexpr size_t kChunkBytes = size_t{1} << 20;

/// Consecutive documents of one file: text when read, tokens when tokenised; or the error that
/// ended the file.
struct Chunk {
  std::vector<std::vector<int32_t>> tokens;
  std::vector<int64_t> text_bytes;
  std::exception_ptr error;
};

/// One file on its way through the workers. Guarded by Pipeline's mutex, but for `reader`, which
/// belongs to the worker that set `reading`.
struct FileState {
  std::unique_ptr<TextReader> reader;
  bool reading = false;
  bool ended = false;
  int64_t chunks_read = 0, chunks_taken = 0;
  int64_t input_read = 0;
  std::map<int64_t, Chunk> finished;  // by their number in the file
};

/// Workers read chunks of the first few unfinished files and tokenise them; the calling thread
/// takes them in order. Each file may be a few chunks ahead of what was taken, so memory is bounded
/// and the file that is taken from can always go on.
class Pipeline {
 public:
  Pipeline(const std::vector<std::filesystem::path>& paths, const TextOptions& options,
           const Tokenizer& tokenizer, int64_t num_workers)
      : paths_(paths), options_(options), tokenizer_(tokenizer), files_(paths.size()) {
    window_ = static_cast<size_t>(num_workers);
    ahead_ = num_workers + 2;
    try {
      for (int64_t i = 0; i < num_workers; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {
      stop();
      throw IoError(fmt::format("cannot start {} threads to tokenise with: {}", num_workers,
                                error.code().message()));
    }
  }

  ~Pipeline() { stop(); }

  /// The next chunk of `file`; nothing at its end. Waits, but not beyond `patience`: then an empty
  /// chunk. Rethrows the file's error where it happened.
  std::optional<Chunk> take(size_t file, std::chrono::milliseconds patience) {
    std::unique_lock lock(mutex_);
    head_ = file;
    FileState& state = files_[file];
    wake_taker_.wait_for(lock, patience, [&] {
      return state.finished.contains(state.chunks_taken) ||
             (state.ended && state.chunks_taken == state.chunks_read);
    });
    const auto found = state.finished.find(state.chunks_taken);
    if (found == state.finished.end()) {
      if (!state.ended || state.chunks_taken < state.chunks_read) return Chunk{};
      head_ = file + 1;
      wake_workers_.notify_all();
      return std::nullopt;
    }
    Chunk chunk = std::move(found->second);
    state.finished.erase(found);
    ++state.chunks_taken;
    wake_workers_.notify_all();
    if (chunk.error) std::rethrow_exception(chunk.error);
    return chunk;
  }

  int64_t input_read() {
    const std::lock_guard lock(mutex_);
    int64_t sum = 0;
    for (const auto& file : files_) sum += file.input_read;
    return sum;
  }

 private:
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_workers_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  /// A file of the window that can be read on; files_.size() when there is none now.
  size_t readable_file() const {
    for (size_t f = head_; f < std::min(files_.size(), head_ + window_); ++f) {
      const FileState& state = files_[f];
      if (!state.reading && !state.ended && state.chunks_read - state.chunks_taken < ahead_)
        return f;
    }
    return files_.size();
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      size_t f = files_.size();
      wake_workers_.wait(lock, [&] {
        return stop_ || head_ >= files_.size() || (f = readable_file()) < files_.size();
      });
      if (stop_ || head_ >= files_.size()) return;
      FileState& state = files_[f];
      state.reading = true;
      const int64_t number = state.chunks_read;
      lock.unlock();

      Chunk chunk;
      std::vector<std::string> texts;
      bool ended = false;
      try {
        ended = read_chunk(f, state, texts);
      } catch (...) {
        ended = true;
        chunk.error = std::current_exception();
      }

      lock.lock();
      state.reading = false;
      state.ended = ended;
      state.input_read = state.reader ? state.reader->input_read() : 0;
      ++state.chunks_read;
      if (ended) state.reader.reset();
      wake_workers_.notify_one();
      lock.unlock();

      try {
        for (const auto& text : texts) {
          if (text.empty()) continue;
          chunk.tokens.push_back(tokenizer_.encode(text));
          chunk.text_bytes.push_back(static_cast<int64_t>(text.size()));
        }
      } catch (...) {
        if (!chunk.error) chunk.error = std::current_exception();
      }

      lock.lock();
      state.finished.emplace(number, std::move(chunk));
      wake_taker_.notify_one();
    }
  }

  /// Reads documents up to about kChunkBytes; true at the end of the file.
  bool read_chunk(size_t file, FileState& state, std::vector<std::string>& texts) const {
    if (!state.reader) state.reader = std::make_unique<TextReader>(paths_[file], options_);
    std::string text;
    for (size_t size = 0; size < kChunkBytes; size += text.size()) {
      if (!state.reader->next(text)) return true;
      texts.push_back(text);
    }
    return false;
  }

  const std::vector<std::filesystem::path>& paths_;
  const TextOptions& options_;
  const Tokenizer& tokenizer_;
  size_t window_ = 1;
  int64_t ahead_ = 1;
  std::mutex mutex_;
  std::condition_variable wake_workers_, wake_taker_;
  std::vector<FileState> files_;
  size_t head_ = 0;  // the file that is taken from
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

int64_t size_of_file(const std::filesystem::path& path) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  return error ? 0 : static_cast<int64_t>(size);
}

}  // namespace

TokenizeProgress tokenize_files(const std::vector<std::filesystem::path>& files,
                                const TextOptions& options, const Tokenizer& tokenizer,
                                int64_t num_workers, const DocumentSink& sink,
                                const TokenizeProgressCallback& progress) {
  require(num_workers >= 1 && num_workers <= 1024, "num_workers: expected 1 to 1024, got {}",
          num_workers);
  using Clock = std::chrono::steady_clock;
  constexpr auto kInterval = std::chrono::milliseconds(100);
  TokenizeProgress counts;
  counts.num_files = static_cast<int64_t>(files.size());
  for (const auto& file : files) counts.input_bytes += size_of_file(file);

  Pipeline pipeline(files, options, tokenizer, num_workers);
  auto reported = Clock::now();
  for (size_t f = 0; f < files.size(); ++f) {
    while (const auto chunk = pipeline.take(f, kInterval)) {
      for (size_t i = 0; i < chunk->tokens.size(); ++i) {
        sink(chunk->tokens[i], chunk->text_bytes[i]);
        counts.num_documents += 1;
        counts.num_tokens += static_cast<int64_t>(chunk->tokens[i].size());
        counts.text_bytes += chunk->text_bytes[i];
      }
      if (progress && Clock::now() - reported >= kInterval) {
        counts.input_read = pipeline.input_read();
        progress(counts);
        reported = Clock::now();
      }
    }
    ++counts.files_done;
  }
  counts.input_read = pipeline.input_read();
  if (progress) progress(counts);
  return counts;
}

TokenizeProgress tokenize_to_shard(const std::vector<std::filesystem::path>& files,
                                   const TextOptions& options, const Tokenizer& tokenizer,
                                   int64_t num_workers, const std::filesystem::path& out,
                                   const TokenizeProgressCallback& progress) {
  ShardWriter writer(out, tokenizer);
  const TokenizeProgress counts = tokenize_files(
      files, options, tokenizer, num_workers,
      [&](const std::vector<int32_t>& tokens, int64_t text_bytes) {
        writer.add(tokens, text_bytes);
      },
      progress);
  writer.finish();
  return counts;
}

}  // namespace dsv3
