#include "client/gpu_device.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/text.h"
#include "kernels/pack_table.h"

namespace stillframe::client {

namespace {

// Enough to fill every GPU of today with two blocks for each of its processors, few enough that a
// block is never waiting long behind the trainer's.
constexpr std::uint32_t kBlockCount = 256;

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

// An event's answer is one of three.
Result<bool> has_happened(const cuda::Context& context, const cuda::Event& event) {
  const cuda::Current current(context);
  const CUresult result = context.calls().cuEventQuery(event.get());
  if (result == CUDA_SUCCESS) return true;
  if (result == CUDA_ERROR_NOT_READY) return false;
  return context.driver().error("wait for a GPU", result);
}

}  // namespace

GpuDevice::GpuDevice(std::shared_ptr<const cuda::Context> context, kernels::GpuKernels kernels)
    : context_(std::move(context)), kernels_(std::move(kernels)) {}

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
  for (cuda::Event* const event : {&device->followed_, &device->packed_[0], &device->packed_[1],
                                   &device->held_, &device->idle_[0], &device->idle_[1]}) {
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
  auto reserved = reserve(share);
  if (!reserved || share.extent_count == 0) return reserved;
  if (setting.has_window) {
    auto made = make_window(layout);
    if (!made) return made;
  }
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

// The descriptors of all parts, in one copy.
Status GpuDevice::upload(const Layout& layout, std::byte* staging) {
  std::uint64_t staging_address = 0;
  if (staging != nullptr) {
    auto found = cuda::device_address(*context_, staging);
    if (!found) return std::move(found).error();
    staging_address = *found;
  }
  struct Place {
    std::uint64_t pieces = 0;
    std::uint64_t first_piece = 0;
  };
  uploaded_.clear();
  const auto append = [this](const void* data, std::size_t bytes) {
    const std::uint64_t offset = uploaded_.size();
    uploaded_.resize(offset + round_up(bytes, sizeof(kernels::Quad)));
    std::memcpy(uploaded_.data() + offset, data, bytes);
    return offset;
  };
  std::vector<Place> places(layout.parts.size());
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
    const auto first = kernels::first_pieces(pieces, layout.parts[part.part].image.bytes);
    places[part.part] = {.pieces = append(pieces.data(), pieces.size() * sizeof(kernels::Piece)),
                         .first_piece = append(first.data(), first.size() * sizeof(std::uint32_t))};
  }
  auto grown = grow(tables_, uploaded_.size());
  if (!grown) return grown;
  jobs_.clear();
  for (const GpuPlan::Chunk& chunk : share_->chunks) {
    const Place& place = places[chunk.part];
    jobs_.push_back(
        {.pieces = address_of<const kernels::Piece>(tables_.buffer.get() + place.pieces),
         .first_piece = address_of<const std::uint32_t>(tables_.buffer.get() + place.first_piece),
         .image_bytes = layout.parts[chunk.part].image.bytes,
         .first_extent = chunk.first_extent,
         .extent_count = chunk.extent_count,
         .image = nullptr,
         .extent_hashes = address_of<std::uint64_t>(hashes_.buffer.get() +
                                                    chunk.first_hash * sizeof(std::uint64_t)),
         .damaged = nullptr});
  }
  const cuda::Current current(*context_);
  return check("copy the descriptors to a GPU",
               calls().cuMemcpyHtoDAsync(tables_.buffer.get(), uploaded_.data(), uploaded_.size(),
                                         pack_stream_.get()));
}

// --- For a capture -------------------------------------------------------------------------------

Status GpuDevice::follow(CUstream trainer) {
  const cuda::Current current(*context_);
  for (const GpuPlan::EarlyCopy& copy : share_->early) {
    auto copied = check("copy a tensor within a GPU",
                        calls().cuMemcpyDtoDAsync(early_.buffer.get() + copy.early_offset,
                                                  copy.data, copy.bytes, trainer));
    if (!copied) return copied;
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

Status GpuDevice::enqueue(std::size_t index, Bytes slot) {
  const GpuPlan::Chunk& chunk = share_->chunks[index];
  const LayoutPart& part = layout_->parts[chunk.part];
  const Bytes target =
      slot.subspan(part.slot_offset + std::uint64_t{chunk.first_extent} * kExtentBytes,
                   chunk_bytes(part, chunk));
  kernels::PackJob job = jobs_[index];
  const cuda::Current current(*context_);
  const std::uint64_t half = index % 2;
  if (window_) {
    job.image = address_of<std::byte>(window_.get() + half * half_bytes_);
    if (index >= 2) {
      auto waited = check("wait for the window",
                          calls().cuStreamWaitEvent(pack_stream_.get(), done_[index - 2].get(), 0));
      if (!waited) return waited;
    }
  } else {
    auto address = cuda::device_address(*context_, slot.data());
    if (!address) return std::move(address).error();
    job.image =
        address_of<std::byte>(*address + static_cast<std::uint64_t>(target.data() - slot.data()));
  }
  auto launched = kernels_.pack(job, kBlockCount, pack_stream_.get());
  if (!launched) return launched;
  return drain(chunk, half, target, done_[index].get());
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

Result<bool> GpuDevice::is_done(std::size_t chunk) const {
  return has_happened(*context_, done_[chunk]);
}

std::span<const std::uint64_t> GpuDevice::hashes(std::size_t index) const {
  const GpuPlan::Chunk& chunk = share_->chunks[index];
  return {static_cast<const std::uint64_t*>(host_hashes_.get()) + chunk.first_hash,
          chunk.extent_count};
}

Status GpuDevice::hold(CUstream trainer) {
  const cuda::Current current(*context_);
  auto recorded = check("mark the fence", calls().cuEventRecord(held_.get(), pack_stream_.get()));
  if (!recorded) return recorded;
  return check("hold the trainer's stream", calls().cuStreamWaitEvent(trainer, held_.get(), 0));
}

Status GpuDevice::mark_idle() {
  const cuda::Current current(*context_);
  auto packs = check("mark a stream", calls().cuEventRecord(idle_[0].get(), pack_stream_.get()));
  if (!packs) return packs;
  return check("mark a stream", calls().cuEventRecord(idle_[1].get(), copy_stream_.get()));
}

Result<bool> GpuDevice::is_idle() const {
  for (const cuda::Event& event : idle_) {
    auto happened = has_happened(*context_, event);
    if (!happened || !*happened) return happened;
  }
  return true;
}

}  // namespace stillframe::client
