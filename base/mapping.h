#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <utility>

#include "base/bytes.h"

namespace stillframe {

// Sole owner of one mmap()ed range; an empty owner is a valid state. Unmaps and does nothing else.
class Mapping {
 public:
  Mapping() = default;
  Mapping(void* address, std::size_t bytes) noexcept
      : data_(static_cast<std::byte*>(address)), bytes_(bytes) {}

  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    Mapping taken(std::move(other));
    std::swap(data_, taken.data_);
    std::swap(bytes_, taken.bytes_);
    return *this;
  }
  ~Mapping() {
    if (data_ != nullptr) (void)::munmap(data_, bytes_);
  }

  Bytes bytes() const noexcept { return {data_, bytes_}; }
  explicit operator bool() const noexcept { return data_ != nullptr; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace stillframe
