#include "client/gpu_device.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/text.h"
#include "client/deadline.h"
#include "cuda/devices.h"
#include "kernels/pack_table.h"

namespace stillframe::client {

namespace {

// Enough to fill every GPU of today with a block for each of its processors, few enough that none
// is waiting long behind the trainer's.
constexpr std::uint32_t kBlockCount = 256;
constexpr std::uint64_t kWorkerPatienceMs = 5'000;
// Until a worker is asked for again. The trainer waits for the answer, mostly an instant, at worst
// as long as for a worker that does not come up: so less and less often.
constexpr std::chrono::seconds kRetryMin{5};
constexpr std::chrono::seconds kRetryMax{3'600};

template <class T>
T* address_of(std::uint64_t device_address) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(device_address));
}

std::uint64_t chunk_bytes(const LayoutPart& part, const GpuPlan::Chunk& chunk) {
  const std::uint64_t begin = std::uint64_t{chunk.first_extent} * kExtentBytes;
  const std::uint64_t end = begin + std::uint64_t{chunk.extent_count} * kExtentBytes;
  // The kernel fills the last leaf up, as the image in the slot is.
  return std::min(end, round_up(part.image.bytes, kLeafBytes)) - begin;
}

}  // namespace

GpuDevice::GpuDevice(std::shared_ptr<const cuda::Context> context, kernels::GpuKernels kernels)
    : context_(std::move(context)), kernels_(std::move(kernels)), torn_check_(context_) {}

Result<std::unique_ptr<GpuDevice>> GpuDevice::open(
    const std::shared_ptr<const cuda::Driver>& driver, int ordinal) {
  auto context = cuda::Context::retain(driver, ordinal);
  if (!context) return std::move(context).error();
  auto kernels = kernels::GpuKernels::load(*context);
  if (!kernels) return std::move(kernels).error();
  std::unique_ptr<GpuDevice> device(new GpuDevice(*context, *std::move(kernels)));
  for (cuda::Stream* const stream : {&device->pack_stream_, &device->copy_stream_}) {
    auto created = cuda::create_stream(*context);
    if (!created) return std::move(created).error();
    *stream = *std::move(created);
  }
  for (cuda::Event* const event :
       {&device->followed_, &device->brought_, &device->packed_[0], &device->packed_[1],
        &device->stopped_, &device->held_, &device->idle_[0], &device->idle_[1]}) {
    auto created = cuda::create_event(*context);
    if (!created) return std::move(created).error();
    *event = *std::move(created);
  }
  return device;
}

// --- For a plan ----------------------------------------------------------------------------------

Status GpuDevice::prepare(const GpuPlan::Share& share, const Layout& layout,
                          const Setting& setting) {
  share_ = &share;
  layout_ = &layout;
  staging_ = setting.staging;
  staging_bytes_ = setting.staging_bytes;
  // They know the pieces of an earlier share.
  lease_.reset();
  torn_check_.clear();
  if (share.extent_count == 0) return ok();
  connect(layout, setting);
  if (lease_) return ok();  // It has no use for what follows.
  auto reserved = reserve(share);
  if (!reserved) return reserved;
  if (setting.has_window && !ring_) {
    auto made = make_window(layout);
    if (!made) return made;
  }
  auto checked = torn_check_.prepare(share, layout);
  if (!checked && checked.error().code() != Code::kResourceExhausted) return checked;
  return upload(layout, setting.staging);
}

Status GpuDevice::grow(Grown& grown, std::uint64_t bytes) {
  if (grown.bytes >= bytes) return ok();
  grown = {};
  auto buffer = cuda::allocate(context_, bytes);
  if (!buffer) return std::move(buffer).error();
  grown = {.buffer = *std::move(buffer), .bytes = bytes};
  return ok();
}

Status GpuDevice::reserve(const GpuPlan::Share& share) {
  auto early = grow(early_, share.early_bytes);
  if (!early) return early;
  const std::uint64_t hash_bytes = share.extent_count * sizeof(std::uint64_t);
  auto hashes = grow(hashes_, hash_bytes);
  if (!hashes) return hashes;
  if (host_hashes_bytes_ < hash_bytes) {
    host_hashes_ = {};
    host_hashes_bytes_ = 0;
    auto host_hashes = cuda::allocate_host(context_, hash_bytes);
    if (!host_hashes) return std::move(host_hashes).error();
    host_hashes_ = *std::move(host_hashes);
    host_hashes_bytes_ = hash_bytes;
  }
  while (done_.size() < share.chunks.size()) {
    auto event = cuda::create_event(context_);
    if (!event) return std::move(event).error();
    done_.push_back(*std::move(event));
  }
  return ok();
}

Status GpuDevice::make_window(const Layout& layout) {
  std::uint64_t wanted = 0;
  for (const GpuPlan::Chunk& chunk : share_->chunks) {
    wanted = std::max(wanted, chunk_bytes(layout.parts[chunk.part], chunk));
  }
  if (window_ && half_bytes_ >= wanted) return ok();
  window_ = {};
  window_reason_.clear();
  auto window = cuda::allocate(context_, 2 * wanted);
  if (window) {
    window_ = *std::move(window);
    half_bytes_ = wanted;
    return ok();
  }
  // A GPU without room to spare is a common one; anything else is not.
  if (window.error().code() != Code::kResourceExhausted) return std::move(window).error();
  window_reason_ = window.error().message();
  return ok();
}

// With the GPU's worker, if one is wanted; without it the window does.
void GpuDevice::connect(const Layout& layout, const Setting& setting) {
  worker_reason_.clear();
  if (setting.lane == GpuLane::kPinned) return;
  auto connected =
      setting.lane == GpuLane::kHbm ? make_ring(layout, setting) : make_lease(layout, setting);
  if (!connected) {
    worker_reason_ = connected.error().message();
    drop_worker();
    retry_wait_ =
        std::clamp<std::chrono::steady_clock::duration>(2 * retry_wait_, kRetryMin, kRetryMax);
    retry_at_ = std::chrono::steady_clock::now() + retry_wait_;
    return;
  }
  retry_wait_ = {};
  window_ = {};
  window_reason_.clear();
}

bool GpuDevice::wants_worker() {
  if (ring_) return ring_->is_gone();
  if (lease_) return lease_->is_gone();
  return !worker_reason_.empty() && std::chrono::steady_clock::now() >= retry_at_;
}

Result<shm::Channel> GpuDevice::open_worker(const Setting& setting) const {
  auto devices = cuda::list_devices(context_->driver());
  if (!devices) return std::move(devices).error();
  const cuda::DeviceFacts& device = (*devices)[static_cast<std::size_t>(context_->ordinal())];
  auto allowed = cuda::may_be_shared(device);
  if (!allowed) return std::move(allowed).error();
  return setting.open_worker(device.uuid);
}

Status GpuDevice::make_ring(const Layout& layout, const Setting& setting) {
  std::vector<std::uint64_t> chunks;
  for (const GpuPlan::Chunk& chunk : share_->chunks) {
    chunks.push_back(chunk_bytes(layout.parts[chunk.part], chunk));
  }
  const kernels::RingBytes needed = kernels::ring_bytes_for(chunks);
  const std::uint64_t wanted =
      setting.ring_bytes == 0 ? needed.max : std::min(needed.max, setting.ring_bytes);
  if (ring_ && (ring_->is_gone() || ring_wanted_bytes_ < wanted || ring_->bytes() < needed.min)) {
    ring_.reset();
  }
  if (!ring_) {
    auto worker = open_worker(setting);
    if (!worker) return std::move(worker).error();
    auto opened = GpuRing::open(context_, *std::move(worker), wanted, std::min(wanted, needed.min),
                                Deadline::after_ms(kWorkerPatienceMs));
    if (!opened) return std::move(opened).error();
    ring_ = *std::move(opened);
    ring_wanted_bytes_ = wanted;
  }
  ring_->lay_out(chunks);
  return ok();
}

Status GpuDevice::make_lease(const Layout& layout, const Setting& setting) {
  if (!fence_) {
    auto fence = GpuFence::make(context_);
    if (!fence) return std::move(fence).error();
    fence_ = *std::move(fence);
  }
  // It is not believed without.
  auto checked = torn_check_.prepare(*share_, layout);
  if (!checked) return checked;
  auto worker = open_worker(setting);
  if (!worker) return std::move(worker).error();
  auto opened = GpuLease::open(context_, *std::move(worker),
                               {.share = share_,
                                .layout = &layout,
                                .staging_bytes = setting.staging_bytes,
                                .ring_bytes = setting.ring_bytes,
                                .fence = fence_.get()},
                               Deadline::after_ms(kWorkerPatienceMs));
  if (!opened) return std::move(opened).error();
  lease_ = *std::move(opened);
  return ok();
}

// The descriptors of all parts, in one copy.
Status GpuDevice::upload(const Layout& layout, std::byte* staging) {
  std::uint64_t staging_address = 0;
  if (staging != nullptr) {
    auto found = cuda::device_address(*context_, staging);
    if (!found) return std::move(found).error();
    staging_address = *found;
  }
  tables_.clear();
  std::vector<std::size_t> images(layout.parts.size());  // Of a part among the tables.
  for (const GpuPlan::PartPieces& part : share_->parts) {
    std::vector<kernels::Piece> pieces;
    pieces.reserve(part.pieces.size());
    for (const GpuPlan::Piece& piece : part.pieces) {
      std::uint64_t address = piece.where;
      switch (piece.origin) {
        case GpuPlan::Origin::kTensor: break;
        case GpuPlan::Origin::kStaging: address += staging_address; break;
        case GpuPlan::Origin::kEarly: address += early_.buffer.get(); break;
      }
      pieces.push_back({.data = address_of<std::byte>(address),
                        .image_offset = piece.image_offset,
                        .bytes = piece.bytes});
    }
    images[part.part] = tables_.add(pieces, layout.parts[part.part].image.bytes);
  }
  const ConstBytes bytes = tables_.bytes();
  auto grown = grow(gpu_tables_, bytes.size());
  if (!grown) return grown;
  jobs_.clear();
  for (const GpuPlan::Chunk& chunk : share_->chunks) {
    jobs_.push_back(tables_.job(images[chunk.part], gpu_tables_.buffer.get(), chunk.first_extent,
                                chunk.extent_count,
                                hashes_.buffer.get() + chunk.first_hash * sizeof(std::uint64_t)));
  }
  const cuda::Current current(*context_);
  return check("copy the descriptors to a GPU",
               calls().cuMemcpyHtoDAsync(gpu_tables_.buffer.get(), bytes.data(), bytes.size(),
                                         pack_stream_.get()));
}

// --- For a capture -------------------------------------------------------------------------------

Status GpuDevice::follow(CUstream trainer, bool is_lazy) {
  enqueued_count_ = 0;
  is_held_ = false;
  is_passed_ = false;
  stopped_at_.reset();
  held_for_ = {};
  if (ring_) ring_->begin();
  if (lease_) lease_->begin();
  const CUdeviceptr early = lease_ ? lease_->early_address() : early_.buffer.get();
  const cuda::Current current(*context_);
  for (const GpuPlan::EarlyCopy& copy : share_->early) {
    auto copied =
        check("copy a tensor within a GPU",
              calls().cuMemcpyDtoDAsync(early + copy.early_offset, copy.data, copy.bytes, trainer));
    if (!copied) return copied;
  }
  torn_check_.forget();
  if (torn_check_.is_ready() && (is_lazy || lease_)) {
    auto set_aside = torn_check_.set_aside(kernels_, trainer);
    if (!set_aside) return set_aside;
  }
  auto recorded =
      check("mark the trainer's stream", calls().cuEventRecord(followed_.get(), trainer));
  if (!recorded) return recorded;
  auto packs = check("wait for the trainer's stream",
                     calls().cuStreamWaitEvent(pack_stream_.get(), followed_.get(), 0));
  if (!packs) return packs;
  return check("wait for the trainer's stream",
               calls().cuStreamWaitEvent(copy_stream_.get(), followed_.get(), 0));
}

Status GpuDevice::fetch(const GpuPlan::Fetch& fetch, std::byte* staging) {
  const cuda::Current current(*context_);
  return check("fetch a tensor from a GPU",
               calls().cuMemcpyDtoHAsync(staging + fetch.staging_offset, fetch.data, fetch.bytes,
                                         copy_stream_.get()));
}

// A worker cannot see the staging, but what was copied to memory that is shared.
Status GpuDevice::end_bringing() {
  auto fetched = torn_check_.fetch(pack_stream_.get());
  if (!fetched) return fetched;
  if (!lease_) return ok();
  const cuda::Current current(*context_);
  if (staging_bytes_ > 0) {
    auto copied = check("copy the host's bytes to a GPU",
                        calls().cuMemcpyHtoDAsync(lease_->staging_address(), staging_,
                                                  staging_bytes_, pack_stream_.get()));
    if (!copied) return copied;
  }
  return check("mark what was brought", calls().cuEventRecord(brought_.get(), pack_stream_.get()));
}

Status GpuDevice::compare(ConstBytes slot, bool compares_all) {
  auto compared = torn_check_.compare(slot);
  if (compared && compares_all) compared = torn_check_.compare_all(slot, copy_stream_.get());
  if (compared || !lease_ || compared.error().code() != Code::kDataLoss) return compared;
  return Error(Code::kDataLoss, concat(compared.error().message(),
                                       ", or the GPU worker packed other bytes than the ",
                                       "training has; use lane pinned"));
}

Bytes GpuDevice::target_of(const GpuPlan::Chunk& chunk, Bytes slot) const {
  const LayoutPart& part = layout_->parts[chunk.part];
  return slot.subspan(part.slot_offset + std::uint64_t{chunk.first_extent} * kExtentBytes,
                      chunk_bytes(part, chunk));
}

Status GpuDevice::enqueue(std::size_t index, const Slot& slot) {
  if (lease_) return ok();
  const GpuPlan::Chunk& chunk = share_->chunks[index];
  const Bytes target = target_of(chunk, slot.bytes);
  kernels::PackJob job = jobs_[index];
  const cuda::Current current(*context_);
  const std::uint64_t half = index % 2;
  if (ring_) {
    job.image = address_of<std::byte>(ring_->address(index));
  } else if (window_) {
    job.image = address_of<std::byte>(window_.get() + half * half_bytes_);
    if (index >= 2) {
      auto waited = check("wait for the window",
                          calls().cuStreamWaitEvent(pack_stream_.get(), done_[index - 2].get(), 0));
      if (!waited) return waited;
    }
  } else {
    auto address = cuda::device_address(*context_, slot.bytes.data());
    if (!address) return std::move(address).error();
    job.image = address_of<std::byte>(
        *address + static_cast<std::uint64_t>(target.data() - slot.bytes.data()));
  }
  auto launched = kernels_.pack(job, kBlockCount, pack_stream_.get());
  if (!launched) return launched;
  auto drained = drain(chunk, half, target, done_[index].get());
  if (drained) ++enqueued_count_;
  return drained;
}

Status GpuDevice::advance(const Slot& slot, GpuWait wait) {
  if (lease_) return advance_lease(slot, wait);
  if (!ring_) return ok();
  // What is not enqueued waits for room in the ring, so that packing waits for what is drained.
  const bool is_hurried = wait == GpuWait::kAll ||
                          (wait == GpuWait::kPacking && enqueued_count_ < share_->chunks.size());
  if (is_hurried) {
    auto hurried = ring_->hurry();
    if (!hurried) return hurried;
  }
  while (ring_->asked_count() < enqueued_count_) {
    const std::size_t index = ring_->asked_count();
    auto packed = cuda::has_happened(*context_, done_[index]);
    if (!packed) return std::move(packed).error();
    if (!*packed) break;
    const Bytes target = target_of(share_->chunks[index], slot.bytes);
    const auto offset = static_cast<std::uint64_t>(target.data() - slot.bytes.data());
    auto asked = ring_->drain(index, slot.arena_offset + offset, is_hurried);
    if (!asked) return std::move(asked).error();
    if (!*asked) break;
  }
  return ring_->advance();
}

Status GpuDevice::drain(const GpuPlan::Chunk& chunk, std::uint64_t half, Bytes target,
                        CUevent done) {
  CUstream stream = pack_stream_.get();
  if (window_) {
    stream = copy_stream_.get();
    auto recorded =
        check("mark a chunk", calls().cuEventRecord(packed_[half].get(), pack_stream_.get()));
    if (!recorded) return recorded;
    auto waited =
        check("wait for a chunk", calls().cuStreamWaitEvent(stream, packed_[half].get(), 0));
    if (!waited) return waited;
    auto copied = check("copy a chunk from a GPU",
                        calls().cuMemcpyDtoHAsync(target.data(), window_.get() + half * half_bytes_,
                                                  target.size(), stream));
    if (!copied) return copied;
  }
  const std::uint64_t hash_offset = chunk.first_hash * sizeof(std::uint64_t);
  auto hashed = check(
      "copy hashes from a GPU",
      calls().cuMemcpyDtoHAsync(static_cast<std::byte*>(host_hashes_.get()) + hash_offset,
                                hashes_.buffer.get() + hash_offset,
                                std::size_t{chunk.extent_count} * sizeof(std::uint64_t), stream));
  if (!hashed) return hashed;
  return check("mark a chunk", calls().cuEventRecord(done, stream));
}

Status GpuDevice::advance_lease(const Slot& slot, GpuWait wait) {
  if (!lease_->is_started()) {
    auto brought = cuda::has_happened(*context_, brought_);
    if (!brought) return std::move(brought).error();
    if (!*brought) return ok();
    auto started = lease_->start(slot.arena_offset);
    if (!started) return started;
  }
  if (wait != GpuWait::kNothing) {
    auto hurried = lease_->hurry(wait == GpuWait::kAll);
    if (!hurried) return hurried;
  }
  return lease_->advance();
}

Result<bool> GpuDevice::is_done(std::size_t chunk) const {
  if (ring_) return chunk < ring_->drained_count();
  if (lease_) return lease_->is_done(chunk);
  return cuda::has_happened(*context_, done_[chunk]);
}

std::span<const std::uint64_t> GpuDevice::hashes(std::size_t index) const {
  if (lease_) return lease_->hashes(index);
  const GpuPlan::Chunk& chunk = share_->chunks[index];
  return {static_cast<const std::uint64_t*>(host_hashes_.get()) + chunk.first_hash,
          chunk.extent_count};
}

Result<bool> GpuDevice::hold(CUstream trainer) {
  const cuda::Current current(*context_);
  auto stops = check("mark the trainer's stream", calls().cuEventRecord(stopped_.get(), trainer));
  if (!stops) return std::move(stops).error();
  if (lease_) {
    // Besides the worker's reading, our own.
    auto brought =
        check("hold the trainer's stream", calls().cuStreamWaitEvent(trainer, brought_.get(), 0));
    if (!brought) return std::move(brought).error();
    auto held = fence_->hold(trainer);
    if (held) is_held_ = *held;
    return held;
  }
  auto recorded = check("mark the fence", calls().cuEventRecord(held_.get(), pack_stream_.get()));
  if (!recorded) return std::move(recorded).error();
  auto held =
      check("hold the trainer's stream", calls().cuStreamWaitEvent(trainer, held_.get(), 0));
  if (!held) return std::move(held).error();
  is_held_ = true;
  return true;
}

Status GpuDevice::watch_hold() {
  if (is_passed_ || !is_held_) return ok();
  const auto now = std::chrono::steady_clock::now();
  if (!stopped_at_) {
    const auto stopped = cuda::has_happened(*context_, stopped_);
    if (!stopped) return stopped.error();
    if (*stopped) stopped_at_ = now;
  }
  const auto passed = lease_ ? fence_->is_open() : cuda::has_happened(*context_, held_);
  if (!passed) return passed.error();
  is_passed_ = *passed;
  if (stopped_at_) held_for_ = now - *stopped_at_;
  return ok();
}

Status GpuDevice::mark_idle() {
  const cuda::Current current(*context_);
  auto packs = check("mark a stream", calls().cuEventRecord(idle_[0].get(), pack_stream_.get()));
  if (!packs) return packs;
  return check("mark a stream", calls().cuEventRecord(idle_[1].get(), copy_stream_.get()));
}

Result<bool> GpuDevice::is_idle() {
  // A worker that is lost does nothing more.
  if (ring_) (void)ring_->advance();
  if (ring_ && !ring_->is_idle()) return false;
  if (lease_) (void)lease_->advance();
  if (lease_ && !lease_->is_idle()) return false;
  for (const cuda::Event& event : idle_) {
    auto happened = cuda::has_happened(*context_, event);
    if (!happened || !*happened) return happened;
  }
  return true;
}

}  // namespace stillframe::client
