#include "data/documents.h"

#include <algorithm>

#include "base/error.h"

namespace dsv3 {

std::vector<int32_t> Documents::tokens(int64_t document) const {
  std::vector<int32_t> ids(static_cast<size_t>(length(document)));
  read(document, 0, static_cast<int64_t>(ids.size()), ids.data());
  return ids;
}

void MemoryDocuments::add(const std::vector<int32_t>& tokens) {
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  offsets_.push_back(static_cast<int64_t>(tokens_.size()));
}

int64_t MemoryDocuments::length(int64_t document) const {
  DSV3_CHECK(document >= 0 && document < num_documents(), "document {} of {}", document,
             num_documents());
  const auto i = static_cast<size_t>(document);
  return offsets_[i + 1] - offsets_[i];
}

void MemoryDocuments::read(int64_t document, int64_t offset, int64_t count, int32_t* out) const {
  DSV3_CHECK(offset >= 0 && count >= 0 && count <= length(document) - offset, "{}+{} of {}", offset,
             count, length(document));
  std::copy_n(tokens_.begin() + offsets_[static_cast<size_t>(document)] + offset, count, out);
}

ConcatenatedDocuments::ConcatenatedDocuments(std::string name,
                                             std::vector<std::shared_ptr<const Documents>> parts)
    : name_(std::move(name)), parts_(std::move(parts)), first_{0} {
  DSV3_CHECK(!parts_.empty(), "{} has no parts", name_);
  for (const auto& part : parts_) {
    require(part->have_end_tokens() == parts_.front()->have_end_tokens(),
            "{}: {} holds end-of-document tokens and {} does not; list them as two sources", name_,
            (part->have_end_tokens() ? part : parts_.front())->name(),
            (part->have_end_tokens() ? parts_.front() : part)->name());
    first_.push_back(first_.back() + part->num_documents());
    num_tokens_ += part->num_tokens();
  }
}

size_t ConcatenatedDocuments::part_of(int64_t document) const {
  DSV3_CHECK(document >= 0 && document < num_documents(), "document {} of {}", document,
             num_documents());
  const auto after = std::upper_bound(first_.begin(), first_.end(), document);
  return static_cast<size_t>(after - first_.begin()) - 1;
}

int64_t ConcatenatedDocuments::length(int64_t document) const {
  const size_t part = part_of(document);
  return parts_[part]->length(document - first_[part]);
}

void ConcatenatedDocuments::read(int64_t document, int64_t offset, int64_t count,
                                 int32_t* out) const {
  const size_t part = part_of(document);
  parts_[part]->read(document - first_[part], offset, count, out);
}

}  // namespace dsv3
