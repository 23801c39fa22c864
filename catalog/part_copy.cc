#include "catalog/part_copy.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/hash.h"
#include "base/text.h"

namespace stillframe::catalog {

namespace {

// One block of the part on its way: read, checked, written.
struct Lane {
  uring::IoRequest request;
  Bytes memory;
  std::uint64_t offset = 0;  // In the part; a multiple of kExtentBytes.
  std::size_t bytes = 0;     // Of the part, without padding.
};

Status check_block(const OpenPart& part, const Lane& lane) {
  if (lane.request.moved_bytes < lane.bytes) {
    return Error(Code::kDataLoss, concat(part.file_name, ": ends early, at ",
                                         lane.offset + lane.request.moved_bytes));
  }
  for (std::size_t done = 0; done < lane.bytes; done += kExtentBytes) {
    const std::size_t bytes = std::min(kExtentBytes, lane.bytes - done);
    const std::uint64_t extent = (lane.offset + done) / kExtentBytes;
    if (hash_extent(lane.memory.subspan(done, bytes)) == part.extent_hashes[extent]) continue;
    return Error(Code::kDataLoss, concat(part.file_name, " extent ", extent, " (offset ",
                                         lane.offset + done, ", ", bytes, " bytes): hash differs"));
  }
  return ok();
}

class RangeCopy {
 public:
  RangeCopy(uring::IoBackend& io, const OpenPart& part, uring::FileId target,
            const PartRange& range, Bytes staging, const Progress& progress)
      : io_(io),
        part_(part),
        target_(target),
        range_(range),
        progress_(progress),
        next_offset_(round_down(range.begin, kExtentBytes)) {
    lane_count_ = std::min(kReadDepth, staging.size() / kReadBlockBytes);
    for (std::size_t i = 0; i < lane_count_; ++i) {
      lanes_[i].memory = staging.subspan(i * kReadBlockBytes, kReadBlockBytes);
      lanes_[i].request.tag = i;
    }
  }

  Status run() {
    write_head();
    for (std::size_t i = 0; i < lane_count_; ++i) start_read(lanes_[i]);
    while (in_flight_count_ > 0) {
      for (uring::IoRequest* request : io_.wait(-1)) finished(*request);
    }
    if (error_) return *std::move(error_);
    return ok();
  }

 private:
  void finished(uring::IoRequest& request) {
    --in_flight_count_;
    if (request.error) fail(*std::move(request.error));
    if (error_) return;
    Lane& lane = lanes_[request.tag];
    if (request.kind == uring::IoRequest::Kind::kRead) {
      start_write(lane);
    } else {
      if (progress_) progress_(request.bytes);
      start_read(lane);
    }
  }

  // The whole blocks of the head, or all of it where no byte of the part follows. What is left of
  // it shares a block with the part's first bytes.
  void write_head() {
    const std::uint64_t whole = range_.begin == range_.end
                                    ? range_.head.size()
                                    : round_down(range_.head.size(), kBlockBytes);
    for (std::uint64_t done = 0; done < whole && !error_; done += kReadBlockBytes) {
      Lane& lane = lanes_[0];
      const std::size_t bytes = std::min<std::uint64_t>(kReadBlockBytes, whole - done);
      const std::size_t padded = round_up(bytes, kBlockBytes);
      std::memcpy(lane.memory.data(), range_.head.data() + done, bytes);
      std::memset(lane.memory.data() + bytes, 0, padded - bytes);
      submit(lane, {.kind = uring::IoRequest::Kind::kWrite,
                    .file = target_,
                    .data = lane.memory.data(),
                    .bytes = padded,
                    .offset = done});
      while (in_flight_count_ > 0) {
        for (uring::IoRequest* request : io_.wait(-1)) {
          --in_flight_count_;
          if (request->error) fail(*std::move(request->error));
        }
      }
    }
  }

  void start_read(Lane& lane) {
    if (error_ || range_.begin == range_.end || next_offset_ >= range_.end) return;
    lane.offset = next_offset_;
    // Whole extents: a hash is of a whole one.
    const std::uint64_t end = std::min(round_up(range_.end, kExtentBytes), part_.bytes);
    lane.bytes = std::min<std::uint64_t>(kReadBlockBytes, end - lane.offset);
    next_offset_ += lane.bytes;
    submit(lane, {.kind = uring::IoRequest::Kind::kRead,
                  .file = part_.file,
                  .data = lane.memory.data(),
                  .bytes = round_up(lane.bytes, kBlockBytes),
                  .offset = lane.offset});
  }

  void start_write(Lane& lane) {
    if (auto checked = check_block(part_, lane); !checked) return fail(std::move(checked).error());
    // From the block of the range's first byte to the block of its last.
    std::size_t first = 0;
    if (range_.begin > lane.offset) {
      const std::size_t begin = range_.begin - lane.offset;
      first = round_down(begin, kBlockBytes);
      const std::size_t shared = begin - first;
      std::memcpy(lane.memory.data() + first, range_.head.data() + range_.head.size() - shared,
                  shared);
    }
    const std::size_t last = std::min<std::uint64_t>(lane.bytes, range_.end - lane.offset);
    // The padding is cut off again, but must not carry old memory to the disk meanwhile (SEC-8).
    const std::size_t padded = round_up(last, kBlockBytes);
    std::memset(lane.memory.data() + last, 0, padded - last);
    submit(lane, {.kind = uring::IoRequest::Kind::kWrite,
                  .file = target_,
                  .data = lane.memory.data() + first,
                  .bytes = padded - first,
                  .offset = lane.offset + first + range_.head.size() - range_.begin});
  }

  struct Transfer {
    uring::IoRequest::Kind kind;
    uring::FileId file;
    std::byte* data;
    std::size_t bytes;
    std::uint64_t offset;
  };

  void submit(Lane& lane, const Transfer& transfer) {
    lane.request.kind = transfer.kind;
    lane.request.file = transfer.file;
    lane.request.data = transfer.data;
    lane.request.bytes = transfer.bytes;
    lane.request.offset = transfer.offset;
    lane.request.moved_bytes = 0;
    lane.request.error.reset();
    auto submitted = io_.submit(lane.request);
    if (!submitted) return fail(std::move(submitted).error());
    ++in_flight_count_;
  }

  void fail(Error error) {
    if (!error_) error_ = std::move(error);
  }

  uring::IoBackend& io_;
  const OpenPart& part_;
  uring::FileId target_;
  const PartRange& range_;
  const Progress& progress_;
  std::array<Lane, kReadDepth> lanes_;
  std::size_t lane_count_ = 0;
  std::uint64_t next_offset_ = 0;
  std::size_t in_flight_count_ = 0;
  std::optional<Error> error_;
};

}  // namespace

Status copy_range(uring::IoBackend& io, const OpenPart& part, uring::FileId target,
                  const PartRange& range, Bytes staging, const Progress& progress) {
  check(staging.size() >= kReadBlockBytes, "copying has staging for one block");
  check(range.begin <= range.end && range.end <= part.bytes, "the range lies in the part");
  check(range.begin == range.end || range.head.size() % kBlockBytes == range.begin % kBlockBytes,
        "the head ends where the range begins in its block");
  return RangeCopy(io, part, target, range, staging, progress).run();
}

}  // namespace stillframe::catalog
