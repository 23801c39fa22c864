#pragma once

#include <memory>
#include <span>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"
#include "client/layout.h"
#include "client/libstillframe.h"
#include "kernels/host_copy.h"

namespace stillframe::client {

// Where the bytes of one capture come from, part by part, in the order of the image. Made once per
// layout and filled for each save; nothing is allocated after the first one (CLI-10).
//
// Owns neither the tensors nor the slot. Session thread only, except that copiers read it during a
// capture.
class CaptureSources {
 public:
  explicit CaptureSources(std::shared_ptr<const Layout> layout);

  // Takes the tensors' addresses, in the order of the layout. kInvalidArgument: their number
  // differs from the layout's, or one has no memory or memory of no kind; the message names it.
  Status fill(std::span<const sf_source> tensors);

  // A tensor of a GPU has no address here until its bytes were brought to the host, element 0 to
  // `data`. Those that a GPU packs itself never get one.
  void set_fetched(std::uint32_t tensor, const std::byte* data);

  // Copies every tensor of the host that is not lazy to its place in the slot, which is its source
  // from then on.
  void copy_eager(std::span<const sf_source> tensors, Bytes slot);

  std::span<const kernels::Source> of_part(std::size_t part) const { return parts_[part]; }
  const kernels::Source& source(TensorPlace place) const {
    return parts_[place.part][place.source];
  }
  // Tensors of the host that are still read from the user's memory after copy_eager(), without
  // empty ones.
  std::span<const TensorPlace> lazy() const noexcept { return lazy_; }
  const Layout& layout() const noexcept { return *layout_; }

 private:
  std::shared_ptr<const Layout> layout_;
  std::vector<std::vector<kernels::Source>> parts_;
  // By tensor, in the order of the layout; made when one is strided for the first time.
  std::vector<std::unique_ptr<kernels::Strides>> strides_;
  std::vector<TensorPlace> lazy_;
};

// The strides that kernels want, or "contiguous" (false): also where strides are given but lead to
// the same bytes.
bool is_strided(const format::TensorSpec& spec, const std::int64_t* stride_bytes) noexcept;

}  // namespace stillframe::client
