#include "client/gpu_lease.h"

#include <poll.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <utility>

#include "base/text.h"
#include "cuda/pointer.h"

namespace stillframe::client {

namespace wire = shm::wire;

namespace {

// A worker that says nothing for that long does not go on; the trainer may be waiting for it. The
// first time that it sees a slot it page-locks it, which may be tens of GiB.
constexpr std::chrono::seconds kPatience{5};
constexpr std::chrono::seconds kFirstPatience{60};
constexpr int kSendPatienceMs = 2'000;
constexpr std::uint64_t kAlignment = 256;
// Of one message.
constexpr std::size_t kHandlesMax = 256;

const void* pointer_to(std::uint64_t address) {
  return reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address));
}

}  // namespace

Result<std::unique_ptr<GpuLease>> GpuLease::open(
    const std::shared_ptr<const cuda::Context>& context, shm::Channel worker,
    const Setting& setting, Deadline deadline) {
  std::unique_ptr<GpuLease> lease(new GpuLease(context, std::move(worker)));
  lease->fence_ = setting.fence;
  auto own = lease->make_own(setting);
  if (!own) return std::move(own).error();
  auto plan = lease->make_plan(setting);
  if (!plan) return std::move(plan).error();
  for (const GpuPlan::Chunk& chunk : setting.share->chunks) {
    lease->extent_counts_.push_back(chunk.extent_count);
  }
  lease->hashes_.resize(setting.share->chunks.size());
  auto sent = lease->send_plan(setting, *plan, own->get(), deadline);
  if (!sent) return std::move(sent).error();
  auto lent = lease->lend_all();
  if (!lent) return std::move(lent).error();
  wire::CaptureGpuT trial;
  trial.is_trial = true;
  auto tried = lease->ask(shm::make_message(0, std::move(trial)), {}, deadline);
  if (!tried) return std::move(tried).error();
  return lease;
}

// --- What is to be packed ------------------------------------------------------------------------

// Empty when nothing needs it.
Result<UniqueFd> GpuLease::make_own(const Setting& setting) {
  staging_offset_ = round_up(setting.share->early_bytes, kAlignment);
  const std::uint64_t bytes = staging_offset_ + setting.staging_bytes;
  if (bytes == 0) return UniqueFd();
  auto made = cuda::SharedBuffer::make(context_, bytes);
  if (!made) return std::move(made).error();
  own_ = std::move(made->buffer);
  return std::move(made->fd);
}

Result<std::uint32_t> GpuLease::find_allocation(std::uint64_t address) {
  // Pieces come in the order of the image, their memory mostly in a few allocations.
  for (std::size_t i = allocations_.size(); i > 0; --i) {
    const Allocation& known = allocations_[i - 1];
    if (address >= known.begin && address - known.begin < known.bytes) {
      return static_cast<std::uint32_t>(i);
    }
  }
  const auto facts = cuda::look_up_pointer(context_->driver(), pointer_to(address));
  if (!facts) return facts.error();
  if (!facts->is_on_gpu || facts->range_bytes == 0) {
    return Error(Code::kUnavailable, "some memory is of no allocation that the driver tells");
  }
  if (!facts->has_legacy_ipc && !facts->has_descriptor) {
    return Error(Code::kUnavailable,
                 "the training's allocator makes memory that no other process can open");
  }
  cuda::Allocation found{.begin = facts->range_begin, .bytes = facts->range_bytes};
  if (!facts->has_legacy_ipc) {
    // One descriptor is of what one handle maps.
    auto mapped = cuda::find_allocation(*context_, address);
    if (!mapped) return std::move(mapped).error();
    found = *mapped;
  }
  allocations_.push_back(
      {.begin = found.begin, .bytes = found.bytes, .has_descriptor = !facts->has_legacy_ipc});
  return static_cast<std::uint32_t>(allocations_.size());
}

// Split where an allocation ends.
Status GpuLease::add_piece(shm::GpuPlan& plan, const GpuPlan::Piece& piece) {
  if (piece.origin != GpuPlan::Origin::kTensor) {
    const bool is_early = piece.origin == GpuPlan::Origin::kEarly;
    plan.pieces.push_back({.allocation = 0,
                           .offset = piece.where + (is_early ? 0 : staging_offset_),
                           .image_offset = piece.image_offset,
                           .bytes = piece.bytes});
    return ok();
  }
  for (std::uint64_t done = 0; done < piece.bytes;) {
    auto found = find_allocation(piece.where + done);
    if (!found) return std::move(found).error();
    const Allocation& allocation = allocations_[*found - 1];
    const std::uint64_t offset = piece.where + done - allocation.begin;
    const std::uint64_t bytes = std::min(piece.bytes - done, allocation.bytes - offset);
    plan.pieces.push_back({.allocation = *found,
                           .offset = offset,
                           .image_offset = piece.image_offset + done,
                           .bytes = bytes});
    done += bytes;
  }
  return ok();
}

Result<shm::GpuPlan> GpuLease::make_plan(const Setting& setting) {
  shm::GpuPlan plan;
  std::vector<std::uint32_t> places(setting.layout->parts.size());  // Of a part in the plan.
  for (const GpuPlan::PartPieces& part : setting.share->parts) {
    const LayoutPart& placed = setting.layout->parts[part.part];
    places[part.part] = static_cast<std::uint32_t>(plan.parts.size());
    const std::size_t before = plan.pieces.size();
    for (const GpuPlan::Piece& piece : part.pieces) {
      auto added = add_piece(plan, piece);
      if (!added) return std::move(added).error();
    }
    plan.parts.push_back({.image_bytes = placed.image.bytes,
                          .slot_offset = placed.slot_offset,
                          .piece_count = plan.pieces.size() - before});
  }
  for (const GpuPlan::Chunk& chunk : setting.share->chunks) {
    plan.chunks.push_back({.part = places[chunk.part],
                           .first_extent = chunk.first_extent,
                           .extent_count = chunk.extent_count});
  }
  plan.allocation_bytes.push_back(own_.bytes());
  for (const Allocation& allocation : allocations_) {
    plan.allocation_bytes.push_back(allocation.bytes);
  }
  return plan;
}

Status GpuLease::send_plan(const Setting& setting, const shm::GpuPlan& plan, int own_fd,
                           Deadline deadline) {
  const std::string blob = shm::encode(plan);
  auto memory = shm::make_sealed_memfd("stillframe-gpu-plan", blob);
  if (!memory) return std::move(memory).error();
  wire::PlanGpuT request;
  request.plan_bytes = blob.size();
  request.words_bytes = GpuFence::kBytes;
  request.word = fence_->next_word();
  request.ring_bytes = setting.ring_bytes;
  const std::array<int, 3> fds = {memory->get(), fence_->fd(), own_fd};
  return ask(shm::make_message(0, std::move(request)), std::span(fds).first(own_fd < 0 ? 2 : 3),
             deadline);
}

// --- The worker ----------------------------------------------------------------------------------

Error GpuLease::gone(const Error& why) {
  is_gone_ = true;
  return Error(Code::kUnavailable, concat("the GPU worker was lost: ", why.message()),
               why.native());
}

// Many descriptors may be more than a socket takes at once; the worker opens them as they come.
Status GpuLease::send(const wire::MessageT& message, std::span<const int> fds) {
  for (;;) {
    auto sent = worker_.send(message, fds);
    if (!sent) return gone(sent.error());
    if (*sent) return ok();
    pollfd writable = {.fd = worker_.fd(), .events = POLLOUT, .revents = 0};
    if (::poll(&writable, 1, kSendPatienceMs) == 0) {
      return gone(Error(Code::kUnavailable, "it does not read"));
    }
  }
}

// Answered by Done.
Status GpuLease::ask(wire::MessageT message, std::span<const int> fds, Deadline deadline) {
  message.request = ++request_;
  auto sent = send(message, fds);
  if (!sent) return sent;
  auto readable = worker_.wait_readable(deadline.rest_ms());
  if (!readable) return std::move(readable).error();
  auto received = worker_.receive();
  if (!received) return std::move(received).error();
  if (!*received) return Error(Code::kUnavailable, "the GPU worker does not answer");
  const wire::BodyUnion& body = (*received)->message.body;
  if (const auto* const failure = body.AsFailure(); failure != nullptr) {
    return shm::from_wire(*failure);
  }
  if (body.AsDone() == nullptr) return Error(Code::kInternal, "the GPU worker answered otherwise");
  return ok();
}

// Handles are made anew for each capture: a kept one may name memory that was given back (GPU-2).
Status GpuLease::lend_all() {
  wire::LeaseGpuT message;
  std::vector<UniqueFd> descriptors;
  const auto flush = [&] {
    if (message.handles.empty() && descriptors.empty()) return ok();
    std::vector<int> fds;
    for (const UniqueFd& fd : descriptors) fds.push_back(fd.get());
    auto sent = send(shm::make_message(0, std::exchange(message, {})), fds);
    descriptors.clear();
    return sent;
  };
  for (const Allocation& allocation : allocations_) {
    const bool is_full = descriptors.size() == shm::kFdsPerMessageMax ||
                         message.handles.size() == kHandlesMax * sizeof(cuda::IpcHandle);
    const bool is_other =
        allocation.has_descriptor ? !message.handles.empty() : !descriptors.empty();
    if (is_full || is_other) {
      auto flushed = flush();
      if (!flushed) return flushed;
    }
    if (allocation.has_descriptor) {
      auto fd = cuda::descriptor_of(*context_, allocation.begin);
      if (!fd) return std::move(fd).error();
      descriptors.push_back(*std::move(fd));
    } else {
      auto handle = cuda::ipc_handle_of(*context_, allocation.begin);
      if (!handle) return std::move(handle).error();
      const auto* const bytes = reinterpret_cast<const std::uint8_t*>(&*handle);
      message.handles.insert(message.handles.end(), bytes, bytes + sizeof *handle);
    }
  }
  return flush();
}

void GpuLease::begin() {
  is_started_ = false;
  is_hurried_ = false;
  is_hurried_for_all_ = false;
  done_count_ = 0;
  fence_value_ = fence_->close();
}

Status GpuLease::start(std::uint64_t arena_offset) {
  auto lent = lend_all();
  if (!lent) return lent;
  wire::CaptureGpuT request;
  request.arena_offset = arena_offset;
  request.fence_value = fence_value_;
  moved_ = std::chrono::steady_clock::now();
  patience_ = used_slots_.insert(arena_offset).second ? kFirstPatience : kPatience;
  auto sent = send(shm::make_message(++request_, std::move(request)));
  if (sent) is_started_ = true;
  return sent;
}

Status GpuLease::hurry(bool is_for_all) {
  if (is_idle() || (is_for_all ? is_hurried_for_all_ : is_hurried_)) return ok();
  is_hurried_ = true;
  is_hurried_for_all_ = is_for_all;
  wire::HurryGpuT request;
  request.is_for_all = is_for_all;
  return send(shm::make_message(0, std::move(request)));
}

Status GpuLease::advance() {
  while (!is_idle()) {
    auto received = worker_.receive();
    if (!received) return gone(received.error());
    if (!*received) {
      if (std::chrono::steady_clock::now() - moved_ < patience_) return ok();
      return gone(
          Error(Code::kUnavailable, concat("it has said nothing for ", patience_.count(), " s")));
    }
    moved_ = std::chrono::steady_clock::now();
    wire::MessageT& message = (*received)->message;
    if (const auto* const failure = message.body.AsFailure(); failure != nullptr) {
      return gone(shm::from_wire(*failure));
    }
    wire::GpuChunkT* const chunk = message.body.AsGpuChunk();
    if (chunk == nullptr || message.request != request_ || chunk->chunk != done_count_ ||
        chunk->hashes.size() != extent_counts_[done_count_]) {
      return gone(Error(Code::kInternal, "it answered what was not asked"));
    }
    hashes_[done_count_++] = std::move(chunk->hashes);
  }
  return ok();
}

bool GpuLease::is_gone() {
  if (is_gone_ || !is_idle()) return is_gone_;
  // It owes nothing, so that whatever comes is its end.
  const auto received = worker_.receive();
  is_gone_ = !received || received->has_value();
  return is_gone_;
}

}  // namespace stillframe::client
