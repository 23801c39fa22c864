#include "kernels/strided.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/check.h"

namespace stillframe::kernels {

namespace {

// A place in the tensor that walks it in logical order, run by run of the last dimension.
class Walker {
 public:
  Walker(const Strides& strides, std::uint64_t element) noexcept {
    check(strides.shape.size() == strides.stride_bytes.size() && strides.shape.size() <= kMaxRank,
          "a shape has one stride per dimension, at most 64 of them");
    merge_dimensions(strides);
    for (std::size_t d = rank_; d-- > 0;) {
      index_[d] = element % shape_[d];
      element /= shape_[d];
      offset_bytes_ += static_cast<std::int64_t>(index_[d]) * stride_[d];
    }
  }

  std::int64_t offset_bytes() const noexcept { return offset_bytes_; }
  std::int64_t stride() const noexcept { return stride_[rank_ - 1]; }
  // Elements from here to the end of the last dimension.
  std::uint64_t run() const noexcept { return shape_[rank_ - 1] - index_[rank_ - 1]; }

  // At most run() elements.
  void advance(std::uint64_t element_count) noexcept {
    std::size_t d = rank_ - 1;
    index_[d] += element_count;
    offset_bytes_ += static_cast<std::int64_t>(element_count) * stride_[d];
    while (index_[d] == shape_[d] && d > 0) {
      offset_bytes_ -= static_cast<std::int64_t>(shape_[d]) * stride_[d];
      index_[d] = 0;
      --d;
      ++index_[d];
      offset_bytes_ += stride_[d];
    }
  }

 private:
  // Dimensions of one element vanish, and a dimension that continues the next one joins it, so that
  // runs are as long as the memory allows.
  void merge_dimensions(const Strides& strides) noexcept {
    for (std::size_t d = 0; d < strides.shape.size(); ++d) {
      const std::uint64_t length = strides.shape[d];
      const std::int64_t stride = strides.stride_bytes[d];
      if (length == 1) continue;
      if (rank_ > 0 && stride_[rank_ - 1] == static_cast<std::int64_t>(length) * stride) {
        shape_[rank_ - 1] *= length;
        stride_[rank_ - 1] = stride;
        continue;
      }
      shape_[rank_] = length;
      stride_[rank_] = stride;
      ++rank_;
    }
    if (rank_ == 0) {
      shape_[0] = 1;
      stride_[0] = static_cast<std::int64_t>(strides.element_bytes);
      rank_ = 1;
    }
  }

  std::size_t rank_ = 0;
  std::int64_t offset_bytes_ = 0;
  std::array<std::uint64_t, kMaxRank> shape_;
  std::array<std::int64_t, kMaxRank> stride_;
  std::array<std::uint64_t, kMaxRank> index_;
};

struct Gather {
  using Tensor = const std::byte*;
  using Packed = std::byte*;
  static void move(Tensor tensor, Packed packed, std::size_t bytes) {
    std::memcpy(packed, tensor, bytes);
  }
};

struct Scatter {
  using Tensor = std::byte*;
  using Packed = const std::byte*;
  static void move(Tensor tensor, Packed packed, std::size_t bytes) {
    std::memcpy(tensor, packed, bytes);
  }
};

// The size as a constant lets the compiler make each element one load and one store.
template <class Direction, std::size_t kElementBytes>
void move_fixed(typename Direction::Tensor tensor, std::int64_t stride,
                typename Direction::Packed packed, std::uint64_t count) {
  for (std::uint64_t i = 0; i < count; ++i) {
    Direction::move(tensor, packed, kElementBytes);
    tensor += stride;
    packed += kElementBytes;
  }
}

template <class Direction>
void move_elements(typename Direction::Tensor tensor, std::int64_t stride,
                   typename Direction::Packed packed, std::uint64_t count,
                   std::size_t element_bytes) {
  if (stride == static_cast<std::int64_t>(element_bytes)) {
    Direction::move(tensor, packed, count * element_bytes);
    return;
  }
  switch (element_bytes) {
    case 1: return move_fixed<Direction, 1>(tensor, stride, packed, count);
    case 2: return move_fixed<Direction, 2>(tensor, stride, packed, count);
    case 4: return move_fixed<Direction, 4>(tensor, stride, packed, count);
    case 8: return move_fixed<Direction, 8>(tensor, stride, packed, count);
    case 16: return move_fixed<Direction, 16>(tensor, stride, packed, count);
    default: break;
  }
  for (std::uint64_t i = 0; i < count; ++i) {
    Direction::move(tensor, packed, element_bytes);
    tensor += stride;
    packed += element_bytes;
  }
}

template <class Direction>
void move_range(const Strides& strides, typename Direction::Tensor data, std::uint64_t offset,
                typename Direction::Packed packed, std::size_t bytes) {
  const std::size_t element_bytes = strides.element_bytes;
  check(element_bytes > 0, "an element has bytes");
  Walker walker(strides, offset / element_bytes);

  // A range can begin inside an element, and end in one, even in the same.
  if (const std::size_t skip_bytes = offset % element_bytes; skip_bytes != 0 && bytes != 0) {
    const std::size_t head_bytes = std::min(bytes, element_bytes - skip_bytes);
    Direction::move(data + walker.offset_bytes() + skip_bytes, packed, head_bytes);
    packed += head_bytes;
    bytes -= head_bytes;
    if (bytes != 0) walker.advance(1);
  }
  while (bytes >= element_bytes) {
    const std::uint64_t count = std::min<std::uint64_t>(walker.run(), bytes / element_bytes);
    move_elements<Direction>(data + walker.offset_bytes(), walker.stride(), packed, count,
                             element_bytes);
    packed += count * element_bytes;
    bytes -= count * element_bytes;
    if (bytes != 0) walker.advance(count);
  }
  if (bytes != 0) Direction::move(data + walker.offset_bytes(), packed, bytes);
}

}  // namespace

void gather(const Strides& strides, const std::byte* data, std::uint64_t offset,
            Bytes packed) noexcept {
  move_range<Gather>(strides, data, offset, packed.data(), packed.size());
}

void scatter(const Strides& strides, std::byte* data, std::uint64_t offset,
             ConstBytes packed) noexcept {
  move_range<Scatter>(strides, data, offset, packed.data(), packed.size());
}

}  // namespace stillframe::kernels
