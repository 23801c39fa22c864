#include "catalog/block_reader.h"

#include <algorithm>
#include <array>
#include <utility>

#include "base/check.h"
#include "base/out_of_memory.h"
#include "base/text.h"

namespace stillframe::catalog {

struct BlockReader::State {
  // One read in flight, or its result.
  struct Read {
    uring::IoRequest request;
    ReadBlock block;
    std::size_t staging_index = 0;
    bool is_in_use = false;
  };

  uring::IoBackend& io;
  const OpenCheckpoint& checkpoint;
  std::vector<ExtentRange> wanted;
  Bytes staging;
  std::size_t range_index = 0;          // Of `wanted`; those before it were submitted in whole.
  std::uint64_t submitted_extents = 0;  // Of wanted[range_index].
  std::vector<std::size_t> free_blocks;
  std::array<Read, kReadDepth> reads;
  std::size_t in_flight_count = 0;
  std::vector<ReadBlock> done;  // The oldest first.
  std::optional<Error> error;   // The first one; final.

  bool has_more() const noexcept { return range_index < wanted.size(); }
  void submit_all();
  std::optional<Error> submit_one(Read& read);
  void collect() noexcept;
};

void BlockReader::State::submit_all() {
  for (Read& read : reads) {
    if (error || !has_more() || free_blocks.empty()) return;
    if (read.is_in_use) continue;
    error = submit_one(read);
  }
}

std::optional<Error> BlockReader::State::submit_one(Read& read) {
  const ExtentRange& range = wanted[range_index];
  const OpenPart& part = checkpoint.parts()[range.part];
  const std::uint64_t extents = std::min<std::uint64_t>(kReadBlockBytes / kExtentBytes,
                                                        range.extent_count - submitted_extents);
  const std::uint64_t offset = (range.first_extent + submitted_extents) * kExtentBytes;
  const std::size_t bytes = std::min<std::uint64_t>(extents * kExtentBytes, part.bytes - offset);

  read.staging_index = free_blocks.back();
  const Bytes target = staging.subspan(read.staging_index * kReadBlockBytes, kReadBlockBytes);
  read.block = {.part = range.part, .offset = offset, .bytes = target.first(bytes)};
  read.request = {.kind = uring::IoRequest::Kind::kRead,
                  .file = part.file,
                  .data = target.data(),
                  .bytes = round_up(bytes, kBlockBytes),
                  .offset = offset,
                  .tag = static_cast<std::uint64_t>(&read - reads.data()),
                  .moved_bytes = 0,
                  .error = std::nullopt};
  auto submitted = io.submit(read.request);
  if (!submitted) return std::move(submitted).error();
  free_blocks.pop_back();
  read.is_in_use = true;
  ++in_flight_count;
  submitted_extents += extents;
  if (submitted_extents == range.extent_count) {
    ++range_index;
    submitted_extents = 0;
  }
  return std::nullopt;
}

// Lets no exception out: a completion that was handed out and not counted would be waited for for
// ever. The vectors have room from the start.
void BlockReader::State::collect() noexcept {
  for (uring::IoRequest* request : io.wait(-1)) {
    check(request->tag < reads.size() && request == &reads[request->tag].request,
          "block reader: a request of somebody else finished");
    Read& read = reads[request->tag];
    read.is_in_use = false;
    --in_flight_count;
    const OpenPart& part = checkpoint.parts()[read.block.part];
    if (request->error || request->moved_bytes < read.block.bytes.size()) {
      free_blocks.push_back(read.staging_index);
      if (error) continue;
      if (!request->error) {
        Status early = or_out_of_memory([&]() -> Status {
          return Error(Code::kDataLoss, concat(part.file_name, ": ends early, at ",
                                               read.block.offset + request->moved_bytes, " of ",
                                               part.bytes, " bytes"));
        });
        request->error = std::move(early).error();
      }
      error = *std::move(request->error);
      continue;
    }
    done.push_back(read.block);
  }
}

BlockReader::BlockReader(uring::IoBackend& io, const OpenCheckpoint& checkpoint,
                         std::vector<ExtentRange> wanted, Bytes staging)
    : state_(new State{.io = io,
                       .checkpoint = checkpoint,
                       .wanted = std::move(wanted),
                       .staging = staging,
                       .free_blocks = {},
                       .reads = {},
                       .done = {},
                       .error = std::nullopt}) {
  std::erase_if(state_->wanted, [](const ExtentRange& range) { return range.extent_count == 0; });
  for (const ExtentRange& range : state_->wanted) {
    const std::vector<OpenPart>& parts = checkpoint.parts();
    const std::uint64_t extents =
        range.part < parts.size() ? format::extent_count(parts[range.part].bytes) : 0;
    if (range.first_extent > extents || range.extent_count > extents - range.first_extent) {
      state_->error =
          Error(Code::kInternal, concat("extents ", range.first_extent, " + ", range.extent_count,
                                        " of part ", range.part, " are not in the checkpoint"));
    }
  }
  state_->free_blocks.reserve(staging.size() / kReadBlockBytes);
  state_->done.reserve(staging.size() / kReadBlockBytes);
  // From the back, so that the first block is lent first.
  for (std::size_t i = staging.size() / kReadBlockBytes; i > 0; --i) {
    state_->free_blocks.push_back(i - 1);
  }
}

BlockReader::~BlockReader() {
  while (state_->in_flight_count > 0) state_->collect();
}

Result<std::optional<ReadBlock>> BlockReader::next() {
  State& state = *state_;
  for (;;) {
    state.submit_all();
    // After an error too, so that a caller who ends here has nothing in flight.
    if (state.error && state.in_flight_count == 0) return *state.error;
    if (!state.error && !state.done.empty()) {
      const ReadBlock block = state.done.front();
      state.done.erase(state.done.begin());
      return std::optional(block);
    }
    if (state.in_flight_count == 0) {
      if (!state.has_more()) return std::optional<ReadBlock>();
      return Error(Code::kInternal, "block reader: every staging block is lent out");
    }
    state.collect();
  }
}

bool BlockReader::starved() const noexcept {
  return !state_->error && state_->done.empty() && state_->in_flight_count == 0 &&
         state_->has_more() && state_->free_blocks.empty();
}

void BlockReader::recycle(const ReadBlock& block) {
  const std::ptrdiff_t offset = block.bytes.data() - state_->staging.data();
  state_->free_blocks.push_back(static_cast<std::size_t>(offset) / kReadBlockBytes);
  state_->submit_all();
}

}  // namespace stillframe::catalog
