#include "client/restore.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <string_view>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/hash.h"
#include "base/os_error.h"
#include "base/out_of_memory.h"
#include "base/text.h"
#include "catalog/run.h"
#include "client/quiet_thread.h"
#include "format/manifest.h"
#include "format/names.h"

namespace stillframe::client {

namespace {

// Eight blocks are in flight while each of two threads empties one: 10 x 1 MiB.
constexpr std::size_t kStagingBlockCount = catalog::kReadDepth + 2;
constexpr std::uint64_t kLendTimeoutMs = 5'000;
// Below it a second thread is not worth its start.
constexpr std::uint64_t kHelpBytesMin = std::uint64_t{8} << 20;
// Beside the reader, of which the drive must not wait for a turn.
constexpr std::uint32_t kEmptierCpusMin = 3;
// From memory: a GPU's bus takes what several threads check and hand to it.
constexpr std::uint32_t kMemoryThreadsMax = 8;

Result<Mapping> map_anonymous(std::size_t bytes) {
  // Two MiB more, so that an aligned piece can be had without a second try.
  void* const address = ::mmap(nullptr, bytes + kHugePageBytes, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return os_error(concat("map ", bytes, " bytes of staging"), errno);
  Mapping mapping(address, bytes + kHugePageBytes);
  (void)::madvise(address, bytes + kHugePageBytes, MADV_HUGEPAGE);
  return mapping;
}

Bytes aligned_part(const Mapping& mapping) {
  const Bytes all = mapping.bytes();
  const auto address = reinterpret_cast<std::uintptr_t>(all.data());
  const std::size_t skip = round_up(address, kHugePageBytes) - address;
  return all.subspan(skip, all.size() - kHugePageBytes);
}

Error extent_damage(const catalog::OpenPart& part, std::uint64_t offset, std::size_t bytes) {
  return Error(Code::kDataLoss, concat(part.file_name, " extent ", offset / kExtentBytes,
                                       " (offset ", offset, ", ", bytes, " bytes): hash differs"));
}

// Verifies consecutive extents of a part that begin at `offset` and gives them to their targets.
Status restore_extents(const catalog::OpenPart& part, std::span<const kernels::Target> targets,
                       kernels::CopyKernel kernel, std::uint64_t offset, ConstBytes bytes) {
  for (std::size_t done = 0; done < bytes.size(); done += kExtentBytes) {
    const ConstBytes extent = bytes.subspan(done, std::min(kExtentBytes, bytes.size() - done));
    const std::uint64_t begin = offset + done;
    const bool has_hashes = !part.extent_hashes.empty();
    const std::uint64_t expected = has_hashes ? part.extent_hashes[begin / kExtentBytes] : 0;
    const bool is_good = kernels::restore_extent(kernel, extent, begin, expected, targets, 0);
    if (has_hashes && !is_good) return extent_damage(part, begin, extent.size());
  }
  return ok();
}

// Blocks on their way between the thread that reads them and the threads that empty them.
class BlockExchange {
 public:
  // Room for all at once: nothing below may want memory, for the reader and the emptiers count on
  // each other to go on.
  BlockExchange() {
    full_.reserve(kStagingBlockCount);
    emptied_.reserve(kStagingBlockCount);
  }

  // Reader: gives a block out, takes emptied ones back. False: somebody has failed.
  bool offer(const catalog::ReadBlock& block) {
    const std::lock_guard lock(mutex_);
    full_.push_back(block);
    changed_.notify_all();
    return !failure_;
  }
  // With `waits`, until one is there or somebody failed. nullopt: none.
  std::optional<catalog::ReadBlock> take_emptied(bool waits) {
    std::unique_lock lock(mutex_);
    if (waits) changed_.wait(lock, [this] { return !emptied_.empty() || failure_; });
    if (emptied_.empty()) return std::nullopt;
    const catalog::ReadBlock block = emptied_.back();
    emptied_.pop_back();
    return block;
  }
  void finish(Status status) {
    const std::lock_guard lock(mutex_);
    if (!status && !failure_) failure_ = std::move(status).error();
    is_finished_ = true;
    changed_.notify_all();
  }
  // Emptier: how what it had in hand at the end went.
  void end(Status status) {
    const std::lock_guard lock(mutex_);
    if (!status && !failure_) failure_ = std::move(status).error();
    changed_.notify_all();
  }
  bool has_failed() {
    const std::lock_guard lock(mutex_);
    return failure_.has_value();
  }

  // Emptier: nullopt once there will be no more.
  std::optional<catalog::ReadBlock> take_full() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !full_.empty() || is_finished_ || failure_; });
    if (failure_ || full_.empty()) return std::nullopt;
    const catalog::ReadBlock block = full_.front();
    full_.erase(full_.begin());
    return block;
  }
  void give_back(const catalog::ReadBlock& block, Status status) {
    const std::lock_guard lock(mutex_);
    emptied_.push_back(block);
    if (!status && !failure_) failure_ = std::move(status).error();
    changed_.notify_all();
  }

  std::optional<Error> failure() {
    const std::lock_guard lock(mutex_);
    return failure_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<catalog::ReadBlock> full_;  // The oldest first.
  std::vector<catalog::ReadBlock> emptied_;
  std::optional<Error> failure_;
  bool is_finished_ = false;
};

// On the backend's thread: reads all that is wanted, unless an emptier fails.
Status read_blocks(uring::IoBackend& io, const catalog::OpenCheckpoint& checkpoint,
                   const RestorePlan& plan, Bytes staging, BlockExchange& exchange) {
  catalog::BlockReader reader(io, checkpoint, plan.wanted, staging);
  for (;;) {
    while (const auto emptied = exchange.take_emptied(reader.starved())) reader.recycle(*emptied);
    if (exchange.has_failed()) return ok();
    if (reader.starved()) continue;
    auto block = reader.next();
    if (!block) return std::move(block).error();
    if (!*block || !exchange.offer(**block)) return ok();
  }
}

// The JSON of a header without its length and its padding.
std::string header_json(const std::string& header) {
  std::string_view json = header;
  json.remove_prefix(std::min<std::size_t>(json.size(), 8));
  while (!json.empty() && json.back() == ' ') json.remove_suffix(1);
  return std::string(json);
}

}  // namespace

CheckpointReader::CheckpointReader(std::unique_ptr<IoOwner> io, std::weak_ptr<Session> session)
    : owner_pid_(::getpid()), io_(std::move(io)), session_(std::move(session)) {}

CheckpointReader::~CheckpointReader() {
  (void)io_->run([this](uring::IoBackend&) { checkpoint_.reset(); });
}

Result<std::unique_ptr<CheckpointReader>> CheckpointReader::open(
    const std::string& run_path, const std::string& selector,
    const std::shared_ptr<Session>& session) {
  auto parsed = format::parse_selector(selector);
  if (!parsed) return std::move(parsed).error();
  auto io = IoOwner::start();
  if (!io) return std::move(io).error();
  std::unique_ptr<CheckpointReader> reader(new CheckpointReader(*std::move(io), session));

  auto opened = reader->take([&](uring::IoBackend& backend) -> Result<catalog::OpenCheckpoint> {
    auto contents = catalog::read_run(backend, run_path);
    if (!contents) return std::move(contents).error();
    auto selected = catalog::select(*contents, *parsed);
    if (!selected) return std::move(selected).error();
    auto checkpoint = catalog::OpenCheckpoint::open(backend, **selected);
    if (!checkpoint) return checkpoint;
    auto state = checkpoint->read_state(0);
    if (!state) return std::move(state).error();
    reader->state_ = *std::move(state);
    return checkpoint;
  });
  if (!opened) return std::move(opened).error();
  return reader;
}

Result<std::unique_ptr<CheckpointReader>> CheckpointReader::open_file(const std::string& path) {
  auto io = IoOwner::start();
  if (!io) return std::move(io).error();
  std::unique_ptr<CheckpointReader> reader(new CheckpointReader(*std::move(io), {}));
  auto opened = reader->take(
      [&](uring::IoBackend& backend) { return catalog::OpenCheckpoint::open_file(backend, path); });
  if (!opened) return std::move(opened).error();
  return reader;
}

Status CheckpointReader::take(
    const std::function<Result<catalog::OpenCheckpoint>(uring::IoBackend&)>& open) {
  Status opened = ok();
  auto ran = io_->run([&](uring::IoBackend& backend) {
    auto checkpoint = open(backend);
    if (checkpoint) {
      checkpoint_.emplace(*std::move(checkpoint));
    } else {
      opened = std::move(checkpoint).error();
    }
  });
  if (!ran) return ran;
  if (!opened) return opened;
  manifest_text_ = format::encode_manifest(checkpoint_->checkpoint().manifest);
  for (const catalog::OpenPart& part : checkpoint_->parts()) {
    headers_.push_back(header_json(part.image.header));
  }
  index_.emplace(checkpoint_->parts());
  return ok();
}

Status CheckpointReader::verify() {
  const std::lock_guard lock(mutex_);
  RestorePlan plan;
  const auto& parts = checkpoint_->parts();
  plan.targets_by_part.resize(parts.size());
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].extent_hashes.empty()) {
      return Error(Code::kInvalidArgument,
                   concat(parts[i].file_name, " was not written by Stillframe: it has no hashes"));
    }
    plan.wanted.push_back(
        {.part = i, .first_extent = 0, .extent_count = parts[i].extent_hashes.size()});
    plan.bytes += parts[i].bytes;
  }
  return read_from_disk(plan, nullptr);
}

Result<CheckpointReader::Stats> CheckpointReader::read(std::span<const sf_target> targets) {
  const std::lock_guard lock(mutex_);
  const auto plan = plan_restore(checkpoint_->parts(), *index_, targets);
  if (!plan) return plan.error();
  Stats stats{.is_from_memory = false, .bytes = plan->bytes};
  if (plan->wanted.empty()) return stats;
  std::optional<GpuTargets> on_gpus;
  if (plan->has_gpu_targets) {
    auto found = GpuTargets::find(*plan, checkpoint_->parts());
    if (!found) return std::move(found).error();
    on_gpus = *std::move(found);
  }
  const GpuTargets* const gpus = on_gpus ? &*on_gpus : nullptr;
  auto from_memory = or_out_of_memory([&] { return read_from_memory(*plan, gpus); });
  if (!from_memory) {
    // The daemon may hold a slot lent that nobody would return.
    if (const auto session = session_.lock()) session->abandon(from_memory.error());
    return std::move(from_memory).error();
  }
  stats.is_from_memory = *from_memory;
  if (stats.is_from_memory) return stats;
  auto read = read_from_disk(*plan, gpus);
  if (!read) return std::move(read).error();
  return stats;
}

// --- From the slot -------------------------------------------------------------------------------

bool CheckpointReader::is_layout_of(const Session& session) const {
  const Layout* const layout = session.layout();
  const auto& parts = checkpoint_->parts();
  if (layout == nullptr || layout->parts.size() != parts.size()) return false;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const format::PartImage& image = layout->parts[i].image;
    if (image.bytes != parts[i].bytes || image.header != parts[i].image.header ||
        image.name != parts[i].image.name) {
      return false;
    }
  }
  return true;
}

// False: not there, or not what the checksums on the disk say. Then the disk is read.
Result<bool> CheckpointReader::read_from_memory(const RestorePlan& plan, const GpuTargets* gpus) {
  const std::shared_ptr<Session> session = session_.lock();
  if (!session || !is_layout_of(*session)) return false;
  const auto lent = session->lend(checkpoint_->checkpoint().manifest.sequence,
                                  Deadline::after_ms(kLendTimeoutMs));
  if (!lent) return false;

  std::vector<catalog::ExtentRange> extents;
  for (const catalog::ExtentRange& range : plan.wanted) {
    for (std::uint64_t i = 0; i < range.extent_count; ++i) {
      extents.push_back(
          {.part = range.part, .first_extent = range.first_extent + i, .extent_count = 1});
    }
  }
  std::atomic<std::size_t> next = 0;
  std::atomic<bool> is_damaged = false;
  const auto restore_extent = [&](GpuFiller& filler, const catalog::ExtentRange& extent) {
    const catalog::OpenPart& part = checkpoint_->parts()[extent.part];
    const std::uint64_t offset = extent.first_extent * kExtentBytes;
    const std::uint64_t bytes = std::min<std::uint64_t>(kExtentBytes, part.bytes - offset);
    const ConstBytes held =
        lent->bytes.subspan(session->layout()->parts[extent.part].slot_offset + offset, bytes);
    auto checked =
        restore_extents(part, plan.targets_by_part[extent.part], session->kernel(), offset, held);
    return checked ? filler.fill(extent.part, offset, held) : checked;
  };
  const auto work = [&] {
    auto filler = or_out_of_memory([&] { return GpuFiller::create(gpus); });
    if (!filler) is_damaged.store(true, std::memory_order_relaxed);
    while (!is_damaged.load(std::memory_order_relaxed)) {
      const std::size_t taken = next.fetch_add(1, std::memory_order_relaxed);
      if (taken >= extents.size()) break;
      const auto restored =
          or_out_of_memory([&] { return restore_extent(*filler, extents[taken]); });
      if (!restored) is_damaged.store(true, std::memory_order_relaxed);
    }
    if (filler && !or_out_of_memory([&] { return filler->wait(); })) {
      is_damaged.store(true, std::memory_order_relaxed);
    }
  };
  std::vector<std::thread> helpers;
  const std::uint64_t thread_count = std::min<std::uint64_t>(
      std::clamp(usable_cpu_count(), 2U, kMemoryThreadsMax), plan.bytes / kHelpBytesMin + 1);
  helpers.reserve(thread_count);
  while (helpers.size() + 1 < thread_count) {
    auto helper = or_out_of_memory([&] { return start_quiet_thread("sf-restore", work); });
    if (!helper) break;  // Fewer do it too.
    helpers.push_back(*std::move(helper));
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  session->give_back(*lent, Deadline::after_ms(kLendTimeoutMs));
  return !is_damaged.load() && (gpus == nullptr || gpus->check());
}

// --- From the drive ------------------------------------------------------------------------------

Status CheckpointReader::make_staging(const RestorePlan& plan) {
  // A range may begin anywhere, so each may end in a block that is not full.
  const std::uint64_t block_count = plan.bytes / catalog::kReadBlockBytes + plan.wanted.size();
  const std::size_t bytes =
      std::min<std::uint64_t>(block_count, kStagingBlockCount) * catalog::kReadBlockBytes;
  if (staging_ && aligned_part(staging_).size() >= bytes) return ok();
  auto mapping = map_anonymous(bytes);
  if (!mapping) return std::move(mapping).error();
  // Not registered: to pin it takes longer than it saves in one restore (adr/0007).
  staging_ = *std::move(mapping);
  return ok();
}

kernels::CopyKernel CheckpointReader::kernel() const {
  if (const std::shared_ptr<Session> session = session_.lock()) return session->kernel();
  return kernels::widest_sequential_kernel();
}

Status CheckpointReader::read_from_disk(const RestorePlan& plan, const GpuTargets* gpus) {
  auto staged = make_staging(plan);
  if (!staged) return staged;
  const kernels::CopyKernel copy_kernel = kernel();
  BlockExchange exchange;
  io_->post([&](uring::IoBackend& io) {
    exchange.finish(or_out_of_memory(
        [&] { return read_blocks(io, *checkpoint_, plan, aligned_part(staging_), exchange); }));
  });
  const auto empty_blocks = [&] {
    auto filler = or_out_of_memory([&] { return GpuFiller::create(gpus); });
    while (const auto block = exchange.take_full()) {
      exchange.give_back(*block, or_out_of_memory([&]() -> Status {
        if (!filler) return filler.error();
        auto checked =
            restore_extents(checkpoint_->parts()[block->part], plan.targets_by_part[block->part],
                            copy_kernel, block->offset, block->bytes);
        return checked ? filler->fill(block->part, block->offset, block->bytes) : checked;
      }));
    }
    if (filler) exchange.end(or_out_of_memory([&] { return filler->wait(); }));
  };
  Result<std::thread> helper = std::thread();
  if (plan.bytes >= kHelpBytesMin && usable_cpu_count() >= kEmptierCpusMin) {
    helper = or_out_of_memory([&] { return start_quiet_thread("sf-restore", empty_blocks); });
  }
  empty_blocks();
  if (helper && helper->joinable()) helper->join();
  auto ran = io_->wait();
  if (!ran) return ran;
  if (auto failure = exchange.failure()) return *std::move(failure);
  return gpus != nullptr ? gpus->check() : ok();
}

Status CheckpointReader::check(std::uint64_t part_index, std::uint64_t offset,
                               ConstBytes bytes) const {
  const std::vector<catalog::OpenPart>& parts = checkpoint_->parts();
  if (part_index >= parts.size()) {
    return Error(Code::kInvalidArgument, concat("there is no part ", part_index));
  }
  const catalog::OpenPart& part = parts[part_index];
  const bool is_within = offset <= part.bytes && bytes.size() <= part.bytes - offset;
  if (offset % kExtentBytes != 0 || !is_within ||
      (bytes.size() % kExtentBytes != 0 && offset + bytes.size() != part.bytes)) {
    return Error(Code::kInvalidArgument, concat(part.file_name, ": bytes ", offset, " + ",
                                                bytes.size(), " are not whole extents of it"));
  }
  for (std::size_t done = 0; done < bytes.size(); done += kExtentBytes) {
    const std::size_t extent_bytes = std::min(kExtentBytes, bytes.size() - done);
    const std::uint64_t extent = (offset + done) / kExtentBytes;
    if (hash_extent(bytes.subspan(done, extent_bytes)) == part.extent_hashes[extent]) continue;
    return Error(Code::kDataLoss,
                 concat(part.file_name, " extent ", extent, " (offset ", offset + done, ", ",
                        extent_bytes, " bytes): hash differs"));
  }
  return ok();
}

}  // namespace stillframe::client
