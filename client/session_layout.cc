// What a session and its daemon agree on before the first save: the layout, and with it the slots
// of the arena and the ring.
#include <sys/stat.h>

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "client/session.h"
#include "client/session_errors.h"

namespace stillframe::client {

namespace wire = shm::wire;

namespace {

constexpr std::uint32_t kSlotCountMax = 64;

bool is_same_file(int a, int b) {
  struct stat first = {};
  struct stat second = {};
  return ::fstat(a, &first) == 0 && ::fstat(b, &second) == 0 && first.st_dev == second.st_dev &&
         first.st_ino == second.st_ino;
}

}  // namespace

Status Session::register_layout(std::span<const sf_part> parts, Deadline deadline) {
  if (capturing_) {
    return Error(Code::kInvalidArgument, "layout: a capture is neither published nor voided");
  }
  if (layout_ && is_same_layout(*layout_, parts)) {
    const auto current = connection();
    if (current && current->is_open()) return ok();
  }
  auto layout = make_layout(parts);
  if (!layout) return std::move(layout).error();
  const std::shared_ptr<const Layout> before = std::exchange(layout_, nullptr);
  auto connected = ensure_connected(deadline);
  if (!connected) {
    layout_ = before;
    return connected;
  }
  return send_layout(*layout, deadline);
}

Status Session::send_layout(const std::shared_ptr<const Layout>& layout, Deadline deadline) {
  layout_ = nullptr;
  sources_ = nullptr;
  const auto current = connection();
  if (!current) return gone_error();
  auto blob = shm::make_sealed_memfd("stillframe-layout", layout->blob);
  if (!blob) return std::move(blob).error();
  {
    const std::lock_guard lock(mutex_);
    ready_slots_.clear();
    offer_.reset();
    layout_id_ = 0;
  }
  std::vector<int> fds = {blob->get()};
  if (arena_) fds.push_back(arena_->fd());
  wire::RegisterLayoutT request;
  request.layout_bytes = layout->blob.size();
  auto reply = current->call(shm::make_message(0, std::move(request)), fds, deadline);
  // The daemon may have gone on to the new layout: only a fresh connection puts us together again.
  const auto fail = [&current](const Error& error) {
    current->drop(error);
    return error;
  };
  if (!reply) return std::move(reply).error();
  const wire::LayoutReplyT* const answer = reply->message.body.AsLayoutReply();
  if (answer == nullptr || reply->fds.size() != 3) return fail(protocol_error("no LayoutReply"));
  if (answer->slot_count == 0 || answer->slot_count > kSlotCountMax ||
      answer->slot_bytes < layout->slot_bytes || answer->slot_bytes % kHugePageBytes != 0 ||
      answer->slot_bytes > (std::uint64_t{1} << 62) / kSlotCountMax ||
      answer->ring_capacity < layout->extent_count) {
    return fail(protocol_error("slots that do not fit the layout"));
  }
  auto ring = shm::RingProducer::open(std::move(reply->fds[1]), std::move(reply->fds[2]),
                                      answer->ring_capacity);
  if (!ring) return fail(ring.error());
  auto mapped = map_arena(std::move(reply->fds[0]), *answer);
  if (!mapped) return fail(mapped.error());
  engine_.set_ring(*std::move(ring));
  layout_ = layout;
  sources_ = std::make_unique<CaptureSources>(layout);
  const std::lock_guard lock(mutex_);
  layout_id_ = answer->layout_id;
  return ok();
}

Status Session::map_arena(UniqueFd memory, const wire::LayoutReplyT& reply) {
  const std::uint64_t bytes = reply.slot_bytes * reply.slot_count;
  const bool is_kept =
      arena_ && arena_->bytes().size() == bytes && is_same_file(arena_->fd(), memory.get());
  if (is_kept && slot_bytes_ == reply.slot_bytes) return ok();
  if (!is_kept) {
    // Before the new one is mapped: together they may be more than there is. What is page-locked
    // goes before its pages do.
    gpus_.drop_workers();
    slots_.clear();
    arena_.reset();
    auto arena = shm::Arena::adopt(std::move(memory), bytes);
    if (!arena) return std::move(arena).error();
    arena_.emplace(*std::move(arena));
  }
  gpus_.drop_workers();
  slot_bytes_ = reply.slot_bytes;
  slots_.clear();
  slots_.resize(reply.slot_count);
  return ok();
}

}  // namespace stillframe::client
