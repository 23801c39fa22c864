#include "daemon/gpu_worker_client.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/text.h"
#include "shm/gpu_plan.h"
#include "shm/sealed_memory.h"

namespace stillframe::daemon {

namespace wire = shm::wire;

namespace {

// Of what is free; the training may still grow.
constexpr std::uint64_t kRingShareMax = 2;
constexpr std::size_t kCopiesMax = 4096;
constexpr std::uint64_t kWordsBytesMax = 1U << 20U;

}  // namespace

bool GpuWorkerClient::send(const wire::MessageT& message, std::span<const int> fds) {
  // Answers are small, and it asks for few at once: one that does not read them is broken.
  const auto sent = channel_.send(message, fds);
  return sent && *sent;
}

bool GpuWorkerClient::answer(std::uint64_t id, Status status) {
  if (status) return send(shm::make_message(id, wire::DoneT()));
  return send(shm::make_message(id, shm::to_wire(status.error())));
}

// What one call fails with may be the client's doing, or the first that is heard of a GPU which has
// broken: then no call works any more, and the worker must end.
Result<bool> GpuWorkerClient::refuse(std::uint64_t id, const Error& error) {
  const auto works = cuda::memory_left(*context_);
  if (!works) return works.error();
  return answer(id, error);
}

Result<bool> GpuWorkerClient::read() {
  for (;;) {
    auto received = channel_.receive();
    if (!received) return false;
    if (!*received) return true;
    auto goes_on = handle(**std::move(received));
    if (!goes_on || !*goes_on) return goes_on;
  }
}

Result<bool> GpuWorkerClient::handle(shm::Packet packet) {
  const std::uint64_t id = packet.message.request;
  const wire::BodyUnion& body = packet.message.body;
  switch (body.type) {
    case wire::Body::MakeGpuRing: return make_ring(id, *body.AsMakeGpuRing());
    case wire::Body::DrainGpuRing: return drain(id, *body.AsDrainGpuRing());
    case wire::Body::PlanGpu: return set_plan(id, *body.AsPlanGpu(), std::move(packet.fds));
    case wire::Body::LeaseGpu: return lease(*body.AsLeaseGpu(), packet.fds);
    case wire::Body::CaptureGpu: return capture(id, *body.AsCaptureGpu());
    case wire::Body::HurryGpu: hurry(*body.AsHurryGpu()); return true;
    default: return false;
  }
}

// --- Lane hbm ------------------------------------------------------------------------------------

Result<bool> GpuWorkerClient::make_ring(std::uint64_t id, const wire::MakeGpuRingT& request) {
  if (ring_ || packer_ || request.bytes == 0 || request.bytes_min > request.bytes) return false;
  const auto left = cuda::memory_left(*context_);
  if (!left) return left.error();
  const std::uint64_t bytes = std::min(request.bytes, left->free_bytes / kRingShareMax);
  if (bytes < request.bytes_min) {
    return answer(id,
                  Error(Code::kResourceExhausted,
                        concat("a ring wants ", request.bytes_min, " bytes at least, half of the ",
                               left->free_bytes, " that are free on the GPU may be taken")));
  }
  auto made = cuda::SharedBuffer::make(context_, bytes);
  if (!made) return refuse(id, made.error());
  ring_ = std::move(made->buffer);
  wire::GpuRingReplyT reply;
  reply.bytes = ring_.bytes();
  const int fds[] = {made->fd.get()};
  return send(shm::make_message(id, std::move(reply)), fds);
}

bool GpuWorkerClient::drain(std::uint64_t id, const wire::DrainGpuRingT& request) {
  if (!ring_ || drain_->waiting_count() >= kCopiesMax || request.bytes == 0) return false;
  if (request.ring_offset > ring_.bytes() || request.bytes > ring_.bytes() - request.ring_offset ||
      !drain_->is_within_slot(request.arena_offset, request.bytes)) {
    return false;
  }
  drain_->add({.id = id,
               .source = ring_.get() + request.ring_offset,
               .arena_offset = request.arena_offset,
               .bytes = request.bytes,
               .is_hurried = request.is_hurried});
  return true;
}

// --- Lane ipc ------------------------------------------------------------------------------------

Result<bool> GpuWorkerClient::set_plan(std::uint64_t id, const wire::PlanGpuT& request,
                                       std::vector<UniqueFd> fds) {
  if (ring_ || packer_) return false;
  auto packer = open_packer(request, fds);
  if (!packer) return refuse(id, packer.error());
  packer_ = *std::move(packer);
  return answer(id, ok());
}

Result<std::unique_ptr<GpuPacker>> GpuWorkerClient::open_packer(const wire::PlanGpuT& request,
                                                                const std::vector<UniqueFd>& fds) {
  if (fds.size() < 2) return Error(Code::kInvalidArgument, "a plan without its descriptors");
  auto blob = shm::read_sealed_memfd(fds[0].get(), request.plan_bytes, shm::kGpuPlanBytesMax);
  if (!blob) return std::move(blob).error();
  auto plan = shm::decode_gpu_plan(std::as_bytes(std::span(*blob)), drain_->slot_bytes());
  if (!plan) return std::move(plan).error();
  if (request.words_bytes > kWordsBytesMax ||
      request.word >= request.words_bytes / sizeof(std::uint32_t)) {
    return Error(Code::kInvalidArgument, "a fence outside of its words");
  }
  auto sealed = shm::check_length_sealed("a fence's words", fds[1].get(), request.words_bytes);
  if (!sealed) return std::move(sealed).error();
  GpuPacker::Fence fence;
  auto words = shm::map_shared(fds[1].get(), request.words_bytes, 4096);
  if (!words) return std::move(words).error();
  fence.words = *std::move(words);
  fence.word = request.word;
  cuda::SharedBuffer own;
  if (plan->allocation_bytes[0] > 0) {
    if (fds.size() < 3) return Error(Code::kInvalidArgument, "a plan without its own memory");
    auto opened = cuda::SharedBuffer::open(context_, fds[2].get(), plan->allocation_bytes[0]);
    if (!opened) return std::move(opened).error();
    own = *std::move(opened);
  }
  return GpuPacker::open(context_, *std::move(plan), std::move(own), std::move(fence),
                         request.ring_bytes);
}

bool GpuWorkerClient::lease(const wire::LeaseGpuT& request, const std::vector<UniqueFd>& fds) {
  if (!packer_ || packer_->is_capturing()) return false;
  if (lease_error_) return true;
  auto leased = lease_all(request, fds);
  if (!leased) lease_error_ = leased.error();
  return true;
}

Status GpuWorkerClient::lease_all(const wire::LeaseGpuT& request,
                                  const std::vector<UniqueFd>& fds) {
  for (const UniqueFd& fd : fds) {
    auto leased = packer_->lease(fd);
    if (!leased) return leased;
  }
  cuda::IpcHandle handle;
  if (request.handles.size() % sizeof handle != 0) {
    return Error(Code::kInvalidArgument, "a part of a handle");
  }
  for (std::size_t at = 0; at < request.handles.size(); at += sizeof handle) {
    std::memcpy(&handle, request.handles.data() + at, sizeof handle);
    auto leased = packer_->lease(handle);
    if (!leased) return leased;
  }
  return ok();
}

Result<bool> GpuWorkerClient::capture(std::uint64_t id, const wire::CaptureGpuT& request) {
  if (!packer_ || packer_->is_capturing()) return false;
  if (!lease_error_ && !packer_->has_all_leases()) {
    lease_error_.emplace(Code::kInvalidArgument, "a capture without all leases");
  }
  const std::optional<Error> error = std::exchange(lease_error_, std::nullopt);
  if (error || request.is_trial) {
    packer_->end_leases();
    return error ? refuse(id, *error) : answer(id, ok());
  }
  if (request.arena_offset % drain_->slot_bytes() != 0 ||
      !drain_->is_within_slot(request.arena_offset, drain_->slot_bytes())) {
    return false;
  }
  capture_id_ = id;
  wait_ = GpuPacker::Wait::kNothing;
  auto begun = packer_->begin(request.arena_offset, request.fence_value);
  if (!begun) return std::move(begun).error();
  return true;
}

// --- Both ----------------------------------------------------------------------------------------

void GpuWorkerClient::hurry(const wire::HurryGpuT& request) {
  wait_ = std::max(wait_, request.is_for_all ? GpuPacker::Wait::kAll : GpuPacker::Wait::kPacking);
  if (request.is_for_all || (packer_ && packer_->has_to_pack())) drain_->hurry();
}

Result<bool> GpuWorkerClient::advance() {
  if (packer_) {
    auto advanced = packer_->advance(*drain_, wait_);
    if (!advanced) return std::move(advanced).error();
  }
  auto ended = drain_->advance();
  if (!ended) return std::move(ended).error();
  for (const std::uint64_t copied : *ended) {
    if (!packer_) {
      if (!answer(copied, ok())) return false;
      continue;
    }
    const auto hashes = packer_->take(copied);
    wire::GpuChunkT chunk;
    chunk.chunk = static_cast<std::uint32_t>(copied);
    chunk.hashes.assign(hashes.begin(), hashes.end());
    if (!send(shm::make_message(capture_id_, std::move(chunk)))) return false;
  }
  return true;
}

bool GpuWorkerClient::is_at_work() const noexcept {
  return drain_->is_copying() || (packer_ && packer_->is_packing());
}

bool GpuWorkerClient::is_busy() const noexcept {
  return drain_->waiting_count() > 0 || is_at_work() || (packer_ && packer_->is_capturing());
}

void GpuWorkerClient::give_up() noexcept {
  drain_->give_up();
  if (packer_) packer_->give_up();
}

}  // namespace stillframe::daemon
