#pragma once

// A client by hand that can lie at each step, beside a daemon and a good trainer.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/hash.h"
#include "base/unique_fd.h"
#include "daemon/snapshot_plan.h"
#include "shm/arena.h"
#include "shm/channel.h"
#include "shm/ring.h"
#include "tests/support/trainer.h"

namespace stillframe::testing {

namespace wire = shm::wire;

inline constexpr int kAnswerTimeoutMs = 20'000;

// A client by hand, one message at a time.
class Peer {
 public:
  explicit Peer(const std::string& socket_path) {
    auto channel = shm::Channel::connect(socket_path);
    EXPECT_TRUE(channel) << channel.error().message();
    if (channel) channel_ = *std::move(channel);
  }
  // At somebody else's than the daemon.
  explicit Peer(UniqueFd socket) : channel_(std::move(socket)) {}

  // The request's number.
  template <class Body>
  std::uint64_t send(Body body, std::vector<int> fds = {}) {
    auto sent = channel_.send(shm::make_message(++request_, std::move(body)), fds);
    EXPECT_TRUE(sent && *sent);
    return request_;
  }

  // The answer to `request`; other messages are passed over. nullopt: we were dropped, or it did
  // not come in time.
  std::optional<shm::Packet> answer(std::uint64_t request) {
    for (;;) {
      auto received = channel_.receive();
      if (!received) return std::nullopt;
      if (!*received) {
        auto waited = channel_.wait_readable(kAnswerTimeoutMs);
        if (!waited || !*waited) return std::nullopt;
        continue;
      }
      if ((*received)->message.request == request) return std::move(**received);
      if ((*received)->message.body.type == wire::Body::SlotOffer) {
        offer_ = *(*received)->message.body.AsSlotOffer();
      }
      if ((*received)->message.body.type == wire::Body::SaveEnded) {
        ended_ = std::move(*(*received)->message.body.AsSaveEnded());
        has_ended_ = true;
      }
    }
  }

  template <class Body>
  std::optional<shm::Packet> ask(Body body, std::vector<int> fds = {}) {
    return answer(send(std::move(body), std::move(fds)));
  }

  bool is_dropped() {
    for (;;) {
      auto received = channel_.receive();
      if (!received) return true;
      if (*received) continue;
      auto waited = channel_.wait_readable(kAnswerTimeoutMs);
      if (!waited || !*waited) return false;
    }
  }

  std::optional<shm::Packet> hello() {
    wire::HelloT hello;
    hello.protocol_version = shm::kProtocolVersion;
    hello.version = "test";
    hello.role = "trainer";
    return ask(std::move(hello));
  }

  std::optional<shm::Packet> attach(const std::string& run_path) {
    wire::AttachT attach;
    attach.run_path = run_path;
    attach.world_size = 1;
    attach.keep_last = 1;
    return ask(std::move(attach));
  }

  // One part, one tensor of `bytes`. True when it was registered; the ring and the arena are then
  // open.
  bool register_layout(std::uint64_t bytes) {
    auto answered = ask_layout(bytes, 0);
    if (!answered || answered->message.body.type != wire::Body::LayoutReply) return false;
    const wire::LayoutReplyT& reply = *answered->message.body.AsLayoutReply();
    slot_bytes_ = reply.slot_bytes;
    ring_fd_ = UniqueFd(::fcntl(answered->fds[1].get(), F_DUPFD_CLOEXEC, 0));
    auto arena =
        shm::Arena::adopt(std::move(answered->fds[0]), reply.slot_bytes * reply.slot_count);
    auto ring = shm::RingProducer::open(std::move(answered->fds[1]), std::move(answered->fds[2]),
                                        reply.ring_capacity);
    if (!arena || !ring) return false;
    arena_.emplace(*std::move(arena));
    ring_.emplace(*std::move(ring));
    return true;
  }

  std::optional<shm::Packet> ask_layout(std::uint64_t bytes, std::int64_t lie_bytes) {
    wire::LayoutT layout;
    auto part = std::make_unique<wire::PartT>();
    part->name = "model";
    auto tensor = std::make_unique<wire::TensorT>();
    tensor->name = "weight";
    tensor->dtype = 1;
    tensor->shape = {bytes};
    part->tensors.push_back(std::move(tensor));
    layout.parts.push_back(std::move(part));
    auto blob = shm::encode(layout);
    EXPECT_TRUE(blob);
    auto plan = daemon::plan_snapshot(std::as_bytes(std::span(*blob)));
    EXPECT_TRUE(plan);
    plan_ = *std::move(plan);
    auto memory = shm::make_sealed_memfd("layout", *blob);
    EXPECT_TRUE(memory);
    wire::RegisterLayoutT request;
    request.layout_bytes = blob->size() + static_cast<std::uint64_t>(lie_bytes);
    return ask(std::move(request), {memory->get()});
  }

  // True when the save was accepted.
  bool begin_save() {
    auto state = shm::make_sealed_memfd("state", "{}");
    EXPECT_TRUE(state);
    wire::BeginSaveT begin;
    begin.step = 1;
    begin.state_bytes = 2;
    begin.busy_timeout_ms = kAnswerTimeoutMs;
    has_ended_ = false;
    auto answered = ask(std::move(begin), {state->get()});
    if (!answered || answered->message.body.type != wire::Body::BeginSaveReply) return false;
    ticket_ = answered->message.body.AsBeginSaveReply()->ticket;
    slot_ = answered->message.body.AsBeginSaveReply()->slot;
    return true;
  }

  // Waits for the offer of a slot, and goes on as if its save had begun; take_offer() says so to
  // the daemon, now or later.
  bool presume_offer() {
    for (int i = 0; i < kAnswerTimeoutMs && !offer_; ++i) {
      if (!ask(wire::StatusT())) return false;
      (void)::usleep(1'000);
    }
    if (!offer_) return false;
    ticket_ = offer_->ticket;
    slot_ = offer_->slot;
    return true;
  }
  void take_offer(std::uint64_t ticket) {
    wire::BeginSaveT begin;
    begin.step = 1;
    begin.state = {'{', '}'};
    begin.state_bytes = begin.state.size();
    begin.offered_ticket = ticket;
    send(std::move(begin));
  }
  const std::optional<wire::SlotOfferT>& offer() const { return offer_; }

  Bytes slot() { return arena_->bytes().subspan(slot_ * slot_bytes_, slot_bytes_); }
  const daemon::SnapshotPlan& plan() const { return plan_; }
  std::uint64_t ticket() const { return ticket_; }
  shm::RingProducer& ring() { return *ring_; }
  int arena_fd() const { return arena_->fd(); }
  int ring_fd() const { return ring_fd_.get(); }

  // Publishes the whole, correct snapshot; `spoil` is added to the first hash.
  void publish(std::uint64_t spoil) {
    const format::PartImage& image = plan_.parts[0];
    std::memcpy(slot().data(), image.header.data(), image.header.size());
    for (std::uint32_t i = 0; i < plan_.extent_counts[0]; ++i) {
      const std::uint64_t offset = i * kExtentBytes;
      const std::uint64_t bytes = std::min<std::uint64_t>(kExtentBytes, image.bytes - offset);
      const std::uint64_t hash = hash_extent(slot().subspan(offset, bytes));
      EXPECT_TRUE(ring().publish({.ticket = ticket_,
                                  .part = 0,
                                  .extent = i,
                                  .hash = hash + (i == 0 ? spoil : 0),
                                  .reserved = 0}));
    }
  }

  void end_capture() {
    wire::EndCaptureT end;
    end.ticket = ticket_;
    end.complete = true;
    send(std::move(end));
  }

  // Waits for the save's end.
  std::optional<wire::SaveEndedT> ended() {
    while (!has_ended_) {
      wire::SettleT settle;
      settle.timeout_ms = kAnswerTimeoutMs;
      if (!ask(std::move(settle))) return std::nullopt;
    }
    return std::move(ended_);
  }

 private:
  shm::Channel channel_;
  std::uint64_t request_ = 0;
  daemon::SnapshotPlan plan_;
  std::uint64_t slot_bytes_ = 0;
  std::uint64_t ticket_ = 0;
  std::size_t slot_ = 0;
  std::optional<shm::Arena> arena_;
  std::optional<shm::RingProducer> ring_;
  UniqueFd ring_fd_;
  std::optional<wire::SlotOfferT> offer_;  // The newest.
  wire::SaveEndedT ended_;
  bool has_ended_ = false;
};

class HostileClient : public ::testing::Test {
 protected:
  void SetUp() override {
    daemon_ = std::make_unique<DaemonProcess>(scratch_.path("socket"), variables());
    ASSERT_TRUE(daemon_->wait_listening());
    good_ = std::make_unique<Trainer>(scratch_.path("good"), scratch_.path("socket"), 2);
    ASSERT_EQ(good_->attach(), SF_OK) << good_->error().message;
  }
  virtual DaemonProcess::Variables variables() const { return {}; }
  // After whatever the test did.
  void TearDown() override {
    EXPECT_EQ(good_->save_durable(1), SF_OK) << good_->error().message;
    good_.reset();
    EXPECT_EQ(daemon_->stop(), 0);
  }

  // A socket and nothing more; empty where the daemon does not even accept.
  UniqueFd connect_raw() const {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, scratch_.path("socket").c_str(), sizeof address.sun_path - 1);
    UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    const auto* const name = reinterpret_cast<const sockaddr*>(&address);
    if (!socket || ::connect(socket.get(), name, sizeof address) != 0) return UniqueFd();
    return socket;
  }
  std::unique_ptr<Peer> connected() { return std::make_unique<Peer>(scratch_.path("socket")); }
  std::unique_ptr<Peer> attached() {
    auto peer = connected();
    EXPECT_TRUE(peer->hello());
    EXPECT_TRUE(peer->attach(scratch_.path("bad")));
    return peer;
  }
  std::unique_ptr<Peer> capturing() {
    auto peer = attached();
    EXPECT_TRUE(peer->register_layout(2'500'000));
    EXPECT_TRUE(peer->begin_save());
    return peer;
  }

  ScratchDirectory scratch_;
  std::unique_ptr<DaemonProcess> daemon_;
  std::unique_ptr<Trainer> good_;
};

}  // namespace stillframe::testing
