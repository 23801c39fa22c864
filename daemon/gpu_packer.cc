#include "daemon/gpu_packer.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "base/check.h"
#include "base/text.h"
#include "cuda/pointer.h"

namespace stillframe::daemon {

namespace {

// All of the GPU: what shares it with us takes turns with us, whatever the size of our grid.
constexpr std::uint32_t kBlockCount = 1024;
// Of what is free; the training may still grow.
constexpr std::uint64_t kRingShareMax = 2;

template <class T>
T* address_of(std::uint64_t device_address) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(device_address));
}

}  // namespace

GpuPacker::GpuPacker(std::shared_ptr<const cuda::Context> context, kernels::GpuKernels kernels,
                     shm::GpuPlan plan, cuda::SharedBuffer own, Fence fence)
    : context_(std::move(context)),
      kernels_(std::move(kernels)),
      plan_(std::move(plan)),
      own_(std::move(own)),
      fence_(std::move(fence)) {}

Result<std::unique_ptr<GpuPacker>> GpuPacker::open(
    const std::shared_ptr<const cuda::Context>& context, shm::GpuPlan plan, cuda::SharedBuffer own,
    Fence fence, std::uint64_t ring_bytes_max) {
  if (plan.allocation_bytes[0] > own.bytes()) {
    return Error(Code::kInvalidArgument, "plan for a GPU worker: its own memory is smaller");
  }
  auto kernels = kernels::GpuKernels::load(context);
  if (!kernels) return std::move(kernels).error();
  std::unique_ptr<GpuPacker> packer(new GpuPacker(context, *std::move(kernels), std::move(plan),
                                                  std::move(own), std::move(fence)));
  auto reserved = packer->reserve(ring_bytes_max);
  if (!reserved) return std::move(reserved).error();
  return packer;
}

// All that captures need.
Status GpuPacker::reserve(std::uint64_t ring_bytes_max) {
  std::vector<std::uint64_t> bytes;
  std::uint64_t hash_count = 0;
  for (const shm::GpuPlan::Chunk& chunk : plan_.chunks) {
    bytes.push_back(shm::chunk_bytes(plan_, chunk));
    first_hash_.push_back(hash_count);
    hash_count += chunk.extent_count;
    auto event = cuda::create_event(context_);
    if (!event) return std::move(event).error();
    packed_.push_back(*std::move(event));
  }
  first_hash_.push_back(hash_count);
  auto stream = cuda::create_stream(context_);
  if (!stream) return std::move(stream).error();
  stream_ = *std::move(stream);

  const auto left = cuda::memory_left(*context_);
  if (!left) return left.error();
  const kernels::RingBytes needed = kernels::ring_bytes_for(bytes);
  std::uint64_t ring_bytes = std::min(needed.max, left->free_bytes / kRingShareMax);
  if (ring_bytes_max != 0) ring_bytes = std::min(ring_bytes, ring_bytes_max);
  if (ring_bytes < needed.min) {
    return Error(Code::kResourceExhausted,
                 concat("packing wants ", needed.min, " bytes at least, half of the ",
                        left->free_bytes, " that are free on the GPU may be taken"));
  }
  auto ring = cuda::allocate(context_, ring_bytes);
  if (!ring) return std::move(ring).error();
  ring_ = *std::move(ring);
  places_ = kernels::ring_places(bytes, ring_bytes);
  std::uint64_t tables_bytes = 0;
  for (const shm::GpuPlan::Part& part : plan_.parts) {
    tables_bytes += kernels::PackTables::bytes_for(part.piece_count, part.image_bytes);
  }
  auto tables = cuda::allocate(context_, tables_bytes);
  if (!tables) return std::move(tables).error();
  gpu_tables_ = *std::move(tables);
  auto hashes = cuda::allocate(context_, hash_count * sizeof(std::uint64_t));
  if (!hashes) return std::move(hashes).error();
  hashes_ = *std::move(hashes);
  auto host_hashes = cuda::allocate_host(context_, hash_count * sizeof(std::uint64_t));
  if (!host_hashes) return std::move(host_hashes).error();
  host_hashes_ = *std::move(host_hashes);
  return ok();
}

std::uint64_t GpuPacker::next_allocation_bytes() const {
  const std::size_t next = leases_.size() + 1;
  return next < plan_.allocation_bytes.size() ? plan_.allocation_bytes[next] : 0;
}

bool GpuPacker::has_all_leases() const noexcept {
  return leases_.size() + 1 == plan_.allocation_bytes.size();
}

Status GpuPacker::lease(const cuda::IpcHandle& handle) {
  const std::uint64_t bytes = next_allocation_bytes();
  if (bytes == 0) return Error(Code::kInvalidArgument, "a lease of no allocation");
  auto opened = cuda::open_ipc_handle(context_, handle);
  if (!opened) return std::move(opened).error();
  // The handle is the client's word; how much it names is the driver's.
  const auto facts =
      cuda::look_up_pointer(context_->driver(), address_of<const void>(opened->get()));
  if (!facts) return facts.error();
  if (!facts->is_on_gpu || facts->ordinal != context_->ordinal() || facts->range_bytes < bytes) {
    return Error(Code::kInvalidArgument, "a lease of another allocation than the plan's");
  }
  const CUdeviceptr begin = opened->get();
  leases_.push_back({.legacy = *std::move(opened), .shared = {}, .begin = begin});
  return ok();
}

Status GpuPacker::lease(const UniqueFd& descriptor) {
  const std::uint64_t bytes = next_allocation_bytes();
  if (bytes == 0) return Error(Code::kInvalidArgument, "a lease of no allocation");
  auto opened = cuda::SharedBuffer::open(context_, descriptor.get(), bytes);
  if (!opened) return std::move(opened).error();
  const CUdeviceptr begin = opened->get();
  leases_.push_back({.legacy = {}, .shared = *std::move(opened), .begin = begin});
  return ok();
}

Status GpuPacker::begin(std::uint64_t arena_offset, std::uint32_t fence_value) {
  arena_offset_ = arena_offset;
  fence_value_ = fence_value;
  launched_count_ = 0;
  packed_count_ = 0;
  drained_count_ = 0;
  is_capturing_ = true;
  return upload();
}

// The descriptors, with the addresses that the allocations have this time, in one copy.
Status GpuPacker::upload() {
  tables_.clear();
  std::size_t next = 0;
  for (const shm::GpuPlan::Part& part : plan_.parts) {
    std::vector<kernels::Piece> pieces;
    for (std::uint64_t i = 0; i < part.piece_count; ++i, ++next) {
      const shm::GpuPlan::Piece& piece = plan_.pieces[next];
      const CUdeviceptr begin =
          piece.allocation == 0 ? own_.get() : leases_[piece.allocation - 1].begin;
      pieces.push_back({.data = address_of<std::byte>(begin + piece.offset),
                        .image_offset = piece.image_offset,
                        .bytes = piece.bytes});
    }
    (void)tables_.add(pieces, part.image_bytes);
  }
  jobs_.clear();
  for (std::size_t i = 0; i < plan_.chunks.size(); ++i) {
    const shm::GpuPlan::Chunk& chunk = plan_.chunks[i];
    jobs_.push_back(tables_.job(chunk.part, gpu_tables_.get(), chunk.first_extent,
                                chunk.extent_count,
                                hashes_.get() + first_hash_[i] * sizeof(std::uint64_t)));
  }
  const ConstBytes bytes = tables_.bytes();
  const cuda::Current current(*context_);
  return check("copy the descriptors to a GPU",
               context_->calls().cuMemcpyHtoDAsync(gpu_tables_.get(), bytes.data(), bytes.size(),
                                                   stream_.get()));
}

Status GpuPacker::launch(std::size_t index) {
  kernels::PackJob job = jobs_[index];
  job.image = address_of<std::byte>(ring_.get() + places_[index].offset);
  auto launched = kernels_.pack(job, kBlockCount, stream_.get());
  if (!launched) return launched;
  const cuda::Current current(*context_);
  const std::uint64_t offset = first_hash_[index] * sizeof(std::uint64_t);
  auto copied = check(
      "copy hashes from a GPU",
      context_->calls().cuMemcpyDtoHAsync(
          static_cast<std::byte*>(host_hashes_.get()) + offset, hashes_.get() + offset,
          std::size_t{plan_.chunks[index].extent_count} * sizeof(std::uint64_t), stream_.get()));
  if (!copied) return copied;
  return check("mark a chunk",
               context_->calls().cuEventRecord(packed_[index].get(), stream_.get()));
}

Status GpuPacker::advance(GpuDrain& drain, Wait wait) {
  while (has_to_pack() && !is_given_up_ && places_[launched_count_].waits_for <= drained_count_) {
    // The training's turn in between, for as long as it does not wait for this.
    if (wait == Wait::kNothing && is_packing()) break;
    auto launched = launch(launched_count_);
    if (!launched) return launched;
    ++launched_count_;
  }
  while (packed_count_ < launched_count_) {
    auto happened = cuda::has_happened(*context_, packed_[packed_count_]);
    if (!happened) return std::move(happened).error();
    if (!*happened) break;
    const std::size_t index = packed_count_++;
    if (packed_count_ == jobs_.size()) {
      // Nothing reads the client's memory any more.
      end_leases();
      const auto words = fence_.words.bytes();
      auto* const word = reinterpret_cast<std::uint32_t*>(words.data()) + fence_.word;
      std::atomic_ref(*word).store(fence_value_, std::memory_order_release);
    }
    if (is_given_up_) continue;
    const shm::GpuPlan::Chunk& chunk = plan_.chunks[index];
    drain.add({.id = index,
               .source = ring_.get() + places_[index].offset,
               .arena_offset = arena_offset_ + plan_.parts[chunk.part].slot_offset +
                               std::uint64_t{chunk.first_extent} * kExtentBytes,
               .bytes = shm::chunk_bytes(plan_, chunk),
               .is_hurried = wait == Wait::kAll || (wait == Wait::kPacking && has_to_pack())});
  }
  return ok();
}

std::span<const std::uint64_t> GpuPacker::take(std::uint64_t chunk) {
  stillframe::check(chunk == drained_count_, "chunks are drained in their order");
  ++drained_count_;
  if (drained_count_ == jobs_.size()) is_capturing_ = false;
  return {static_cast<const std::uint64_t*>(host_hashes_.get()) + first_hash_[chunk],
          first_hash_[chunk + 1] - first_hash_[chunk]};
}

}  // namespace stillframe::daemon
