#include "client/part_writer.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/hash.h"
#include "base/os_error.h"
#include "base/out_of_memory.h"
#include "base/step.h"
#include "base/text.h"

namespace stillframe::client {

PartWriter::PartWriter(uring::IoBackend& io, uring::FileId file, const LayoutPart& part,
                       std::span<const kernels::Source> sources, Bytes staging)
    : io_(io),
      file_(file),
      part_(part),
      sources_(sources),
      staging_(staging),
      kernel_(kernels::widest_sequential_kernel()),
      hashes_(part.extent_count, 0) {
  check(staging.size() >= kStagingBytes, "the writer has memory for its blocks");
}

Status PartWriter::write(std::uint32_t first, std::uint32_t end) {
  while (first < end && !error_) {
    const auto idle = std::ranges::find(flights_, false, &Flight::is_busy);
    if (idle == flights_.end()) {
      finish_some();
      continue;
    }
    const std::uint32_t count = std::min<std::uint32_t>(kBlockExtents, end - first);
    start(*idle, first, count);
    first += count;
  }
  // The staging memory stays in use until the last completion, error or not (URING-14).
  while (std::ranges::any_of(flights_, &Flight::is_busy)) finish_some();
  if (error_) return *std::exchange(error_, std::nullopt);
  return ok();
}

void PartWriter::hash(std::uint32_t first, std::uint32_t end) {
  for (std::uint32_t extent = first; extent < end; ++extent) {
    capture(extent, staging_.first(kExtentBytes));
  }
}

Bytes PartWriter::block_of(const Flight& flight) const {
  const auto index = static_cast<std::size_t>(&flight - flights_.data());
  return staging_.subspan(index * kBlockExtents * kExtentBytes, kBlockExtents * kExtentBytes);
}

std::uint64_t PartWriter::extent_bytes(std::uint32_t extent) const {
  return std::min<std::uint64_t>(kExtentBytes, part_.image.bytes - extent * kExtentBytes);
}

void PartWriter::capture(std::uint32_t extent, Bytes target) {
  hashes_[extent] =
      kernels::capture_extent(kernel_, sources_, part_.first_source[extent],
                              std::uint64_t{extent} * kExtentBytes, part_.image.bytes, target);
}

void PartWriter::start(Flight& flight, std::uint32_t first, std::uint32_t count) {
  const Bytes block = block_of(flight);
  std::uint64_t bytes = 0;
  for (std::uint32_t i = 0; i < count; ++i) {
    capture(first + i, block.subspan(i * kExtentBytes, kExtentBytes));
    bytes += extent_bytes(first + i);
  }
  flight.first_extent = first;
  flight.extent_count = count;
  flight.request = {.kind = uring::IoRequest::Kind::kWrite,
                    .file = file_,
                    .data = block.data(),
                    .bytes = round_up(bytes, kBlockBytes),
                    .offset = std::uint64_t{first} * kExtentBytes,
                    .tag = static_cast<std::uint64_t>(&flight - flights_.data()),
                    .moved_bytes = 0,
                    .error = std::nullopt};
  if (int e = STEP_ERROR("write: block"); e != 0) {
    error_ = os_error("write part", e);
    return;
  }
  // No exception either while other blocks are on their way.
  auto submitted = or_out_of_memory([&] { return io_.submit(flight.request); });
  if (!submitted) {
    error_ = std::move(submitted).error();
    return;
  }
  flight.is_busy = true;
}

void PartWriter::finish_some() {
  for (uring::IoRequest* request : io_.wait(-1)) {
    Flight& flight = flights_[request->tag];
    flight.is_busy = false;
    if (!request->error) {
      check(request->moved_bytes == request->bytes, "a write without an error moved all its bytes");
      auto checked = or_out_of_memory([&] { return check_block(flight); });
      if (!checked) request->error = std::move(checked).error();
    }
    if (request->error && !error_) error_ = std::move(request->error);
  }
}

Status PartWriter::check_block(const Flight& flight) const {
  const Bytes block = block_of(flight);
  for (std::uint32_t i = 0; i < flight.extent_count; ++i) {
    const std::uint32_t extent = flight.first_extent + i;
    if (hash_extent(block.subspan(i * kExtentBytes, extent_bytes(extent))) == hashes_[extent]) {
      continue;
    }
    return Error(Code::kDataLoss, concat("part ", part_.image.name, " extent ", extent,
                                         ": its tensors changed while they were written"));
  }
  return ok();
}

}  // namespace stillframe::client
