#include "client/gpu_ring.h"

#include <utility>

#include "base/check.h"
#include "base/text.h"

namespace stillframe::client {

namespace wire = shm::wire;

Result<std::unique_ptr<GpuRing>> GpuRing::open(const std::shared_ptr<const cuda::Context>& context,
                                               shm::Channel worker, std::uint64_t bytes,
                                               std::uint64_t bytes_min, Deadline deadline) {
  wire::MakeGpuRingT request;
  request.bytes = bytes;
  request.bytes_min = bytes_min;
  auto sent = worker.send(shm::make_message(0, std::move(request)));
  if (!sent) return std::move(sent).error();
  auto readable = worker.wait_readable(deadline.rest_ms());
  if (!readable) return std::move(readable).error();
  if (!*readable) return Error(Code::kUnavailable, "the GPU worker does not answer");
  auto received = worker.receive();
  if (!received) return std::move(received).error();
  if (!*received) return Error(Code::kUnavailable, "the GPU worker does not answer");
  const shm::Packet& packet = **received;
  if (const auto* const failure = packet.message.body.AsFailure(); failure != nullptr) {
    return shm::from_wire(*failure);
  }
  const wire::GpuRingReplyT* const reply = packet.message.body.AsGpuRingReply();
  if (reply == nullptr || packet.fds.size() != 1 || reply->bytes < bytes_min) {
    return Error(Code::kInternal, "the GPU worker gave no ring");
  }
  auto memory = cuda::SharedBuffer::open(context, packet.fds[0].get(), reply->bytes);
  if (!memory) return std::move(memory).error();
  return std::unique_ptr<GpuRing>(new GpuRing(std::move(worker), *std::move(memory)));
}

void GpuRing::lay_out(std::span<const std::uint64_t> chunk_bytes) {
  chunk_bytes_.assign(chunk_bytes.begin(), chunk_bytes.end());
  places_ = kernels::ring_places(chunk_bytes, memory_.bytes());
}

void GpuRing::begin() {
  first_request_ += asked_count_;
  asked_count_ = 0;
  drained_count_ = 0;
}

Error GpuRing::gone(const Error& why) {
  is_gone_ = true;
  return Error(Code::kUnavailable, concat("the GPU worker was lost: ", why.message()),
               why.native());
}

Result<bool> GpuRing::drain(std::size_t chunk, std::uint64_t arena_offset, bool is_hurried) {
  check(chunk == asked_count_, "chunks are drained in their order");
  wire::DrainGpuRingT request;
  request.ring_offset = places_[chunk].offset;
  request.arena_offset = arena_offset;
  request.bytes = chunk_bytes_[chunk];
  request.is_hurried = is_hurried;
  auto sent = worker_.send(shm::make_message(first_request_ + chunk, std::move(request)));
  if (!sent) return gone(sent.error());
  if (*sent) {
    ++asked_count_;
    is_paused_for_ = !is_hurried;
  }
  return *sent;
}

Status GpuRing::hurry() {
  if (!is_paused_for_ || is_idle()) return ok();
  wire::HurryGpuT request;
  request.is_for_all = true;
  auto sent = worker_.send(shm::make_message(0, std::move(request)));
  if (!sent) return gone(sent.error());
  is_paused_for_ = !*sent;
  return ok();
}

bool GpuRing::is_gone() {
  if (is_gone_ || drained_count_ != asked_count_) return is_gone_;
  // It owes nothing, so that whatever comes is its end.
  const auto received = worker_.receive();
  is_gone_ = !received || received->has_value();
  return is_gone_;
}

Status GpuRing::advance() {
  while (!is_idle()) {
    auto received = worker_.receive();
    if (!received) return gone(received.error());
    if (!*received) return ok();
    const wire::MessageT& message = (*received)->message;
    if (message.body.AsDone() == nullptr || message.request != first_request_ + drained_count_) {
      return gone(Error(Code::kInternal, "it answered what was not asked"));
    }
    ++drained_count_;
  }
  return ok();
}

}  // namespace stillframe::client
