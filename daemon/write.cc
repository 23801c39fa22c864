// C4 and C5 of a save: extents go to the drive as they are captured, and what was written is hashed
// again.
#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "base/hash.h"
#include "base/os_error.h"
#include "base/step.h"
#include "base/text.h"
#include "daemon/save.h"

namespace stillframe::daemon {

namespace {

// 4 MiB x 4 in flight: 8 MiB saturate a virtual drive and p99 grows with depth (URING-7).
constexpr std::size_t kExtentsPerWrite = 4;
constexpr std::size_t kWriteDepth = 4;

// Up to four neighbouring extents of one part, written by one request.
struct Block {
  std::uint32_t part = 0;
  std::uint32_t first_extent = 0;
  std::uint32_t extent_count = 0;
};

// Results of the hash pool, shared with its jobs.
class Checks {
 public:
  explicit Checks(uring::IoBackend& io) : io_(io) {}

  // Wakes the writer under the lock: who reads the last result knows that its job needs the
  // backend, and the writer, no longer.
  void finish(std::uint64_t extent_count, std::optional<Error> error) {
    const std::lock_guard lock(mutex_);
    ++job_count_;
    extent_count_ += extent_count;
    if (error && !error_) error_ = std::move(error);
    io_.wake();
  }
  std::uint64_t job_count() const {
    const std::lock_guard lock(mutex_);
    return job_count_;
  }
  std::uint64_t extent_count() const {
    const std::lock_guard lock(mutex_);
    return extent_count_;
  }
  std::optional<Error> error() const {
    const std::lock_guard lock(mutex_);
    return error_;
  }

 private:
  uring::IoBackend& io_;
  mutable std::mutex mutex_;
  std::uint64_t job_count_ = 0;
  std::uint64_t extent_count_ = 0;
  std::optional<Error> error_;
};

class ShardWriter {
 public:
  ShardWriter(uring::IoBackend& io, const StagedShard& staged, const Snapshot& snapshot,
              HashPool& hash_pool)
      : io_(io),
        staged_(staged),
        snapshot_(snapshot),
        hash_pool_(hash_pool),
        checks_(std::make_shared<Checks>(io)) {
    for (const std::uint32_t count : snapshot.plan.extent_counts) {
      hashes_.emplace_back(count, 0);
      missing_.emplace_back();
      for (std::uint32_t first = 0; first < count; first += kExtentsPerWrite) {
        missing_.back().push_back(
            static_cast<std::uint8_t>(std::min<std::uint32_t>(kExtentsPerWrite, count - first)));
      }
    }
  }

  // Invariant at the top of the loop: every extent is waiting in the stream, counted in missing_,
  // in ready_, in flight, or in a hash job.
  Result<std::vector<std::vector<std::uint64_t>>> run() {
    for (;;) {
      const SnapshotStream::End end = take_captured();
      if (end == SnapshotStream::End::kVoided) return give_up(snapshot_.stream.void_reason());
      start_writes();
      if (auto error = failure()) return give_up(*std::move(error));
      if (end == SnapshotStream::End::kComplete &&
          checks_->extent_count() == snapshot_.plan.extent_count) {
        return std::move(hashes_);
      }
      // Ends at a completion, and at the wake of a captured extent, of the capture's end or of a
      // hash job.
      for (uring::IoRequest* request : io_.wait(-1)) finish_write(*request);
    }
  }

 private:
  struct Flight {
    uring::IoRequest request;
    Block block;
    bool busy = false;
  };

  SnapshotStream::End take_captured() {
    const SnapshotStream::Taken taken = snapshot_.stream.take();
    for (const SnapshotStream::Extent& extent : taken.extents) {
      hashes_[extent.part][extent.extent] = extent.hash;
      std::uint8_t& missing = missing_[extent.part][extent.extent / kExtentsPerWrite];
      if (--missing == 0) ready_.push_back(block_around(extent.part, extent.extent));
    }
    return taken.end;
  }

  Block block_around(std::uint32_t part, std::uint32_t extent) const {
    const auto first = static_cast<std::uint32_t>(round_down(extent, kExtentsPerWrite));
    const std::uint32_t count = snapshot_.plan.extent_counts[part];
    return {.part = part,
            .first_extent = first,
            .extent_count = std::min<std::uint32_t>(kExtentsPerWrite, count - first)};
  }

  Bytes bytes_of(const Block& block) const {
    const Bytes image = snapshot_.plan.image(snapshot_.slot, block.part);
    const std::size_t offset = block.first_extent * kExtentBytes;
    return image.subspan(offset,
                         std::min(block.extent_count * kExtentBytes, image.size() - offset));
  }

  void start_writes() {
    for (Flight& flight : flights_) {
      if (flight.busy || ready_.empty() || error_) continue;
      flight.block = ready_.front();
      ready_.pop_front();
      const Bytes bytes = bytes_of(flight.block);
      flight.request = uring::IoRequest();
      flight.request.kind = uring::IoRequest::Kind::kWrite;
      flight.request.file = staged_.files()[flight.block.part].id;
      flight.request.data = bytes.data();
      flight.request.bytes = bytes.size();
      flight.request.offset = flight.block.first_extent * kExtentBytes;
      flight.request.tag = static_cast<std::uint64_t>(&flight - flights_.data());
      if (int e = STEP_ERROR("C4 write"); e != 0) {
        error_ = os_error("write part", e);
        return;
      }
      auto submitted = io_.submit(flight.request);
      if (!submitted) {
        error_ = std::move(submitted).error();
        return;
      }
      flight.busy = true;
    }
  }

  void finish_write(uring::IoRequest& request) {
    Flight& flight = flights_[request.tag];
    flight.busy = false;
    if (request.error) {
      if (!error_) error_ = std::move(request.error);
      return;
    }
    check(request.moved_bytes == request.bytes, "a write without an error has moved all its bytes");
    ++hash_job_count_;
    hash_pool_.post([this, checks = checks_, block = flight.block] {
      checks->finish(block.extent_count, check_block(block));
    });
  }

  // Hash pool thread. Reads only what no longer changes while the job runs: run() and give_up()
  // wait for every job, so `this` outlives it.
  std::optional<Error> check_block(const Block& block) const {
    const format::PartImage& part = snapshot_.plan.parts[block.part];
    const Bytes image = snapshot_.plan.image(snapshot_.slot, block.part);
    for (std::uint32_t i = 0; i < block.extent_count; ++i) {
      const std::uint32_t extent = block.first_extent + i;
      const std::uint64_t offset = extent * kExtentBytes;
      const std::uint64_t bytes = std::min<std::uint64_t>(kExtentBytes, part.bytes - offset);
      // The padding counts as zeros whatever it is: only the file's own bytes are hashed.
      if (hash_extent(image.subspan(offset, bytes)) != hashes_[block.part][extent]) {
        return Error(Code::kDataLoss,
                     concat("part ", part.name, " extent ", extent, " (offset ", offset,
                            "): its bytes changed after they were captured"));
      }
    }
    return std::nullopt;
  }

  std::optional<Error> failure() const {
    if (error_) return error_;
    return checks_->error();
  }

  // The slot and this object stay in use until the last completion (URING-14) and the last hash
  // job.
  Error give_up(Error reason) {
    while (io_.in_flight() > 0 || checks_->job_count() < hash_job_count_) {
      for (uring::IoRequest* request : io_.wait(-1)) flights_[request->tag].busy = false;
    }
    return reason;
  }

  uring::IoBackend& io_;
  const StagedShard& staged_;
  const Snapshot& snapshot_;
  HashPool& hash_pool_;
  std::vector<std::vector<std::uint64_t>> hashes_;
  std::vector<std::vector<std::uint8_t>> missing_;  // By part and block: extents not yet captured.
  std::deque<Block> ready_;
  std::array<Flight, kWriteDepth> flights_;
  std::shared_ptr<Checks> checks_;
  std::uint64_t hash_job_count_ = 0;
  std::optional<Error> error_;
};

// The client copies the header like a tensor; a checkpoint whose header is not the layout's would
// restore into the wrong places, with valid hashes.
Status compare_headers(const Snapshot& snapshot) {
  for (std::size_t i = 0; i < snapshot.plan.parts.size(); ++i) {
    const std::string& header = snapshot.plan.parts[i].header;
    const Bytes image = snapshot.plan.image(snapshot.slot, i);
    if (std::memcmp(image.data(), header.data(), header.size()) != 0) {
      return Error(Code::kDataLoss, concat("part ", snapshot.plan.parts[i].name,
                                           ": the captured header is not the registered layout's"));
    }
  }
  return ok();
}

}  // namespace

Result<WrittenShard> write(uring::IoBackend& io, const StagedShard& staged,
                           const Snapshot& snapshot, HashPool& hash_pool) {
  ShardWriter writer(io, staged, snapshot, hash_pool);
  auto hashes = writer.run();
  if (!hashes) return std::move(hashes).error();
  STEP("C5 compare headers");
  auto compared = compare_headers(snapshot);
  if (!compared) return std::move(compared).error();
  WrittenShard written;
  written.extent_hashes_ = *std::move(hashes);
  return written;
}

}  // namespace stillframe::daemon
