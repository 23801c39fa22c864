// Clients that lie: each is dropped or refused, and a good trainer beside it is served as before.
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/hash.h"
#include "base/rng.h"
#include "base/unique_fd.h"
#include "daemon/snapshot_plan.h"
#include "shm/arena.h"
#include "shm/channel.h"
#include "shm/ring.h"
#include "tests/support/trainer.h"

namespace stillframe::testing {
namespace {

namespace wire = shm::wire;

constexpr int kAnswerTimeoutMs = 20'000;

// A client by hand, one message at a time.
class Peer {
 public:
  explicit Peer(const std::string& socket_path) {
    auto channel = shm::Channel::connect(socket_path);
    EXPECT_TRUE(channel) << channel.error().message();
    if (channel) channel_ = *std::move(channel);
  }

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
    return ask(std::move(attach));
  }

  // One part, one tensor of `bytes`. True when it was registered; the ring and the arena are then
  // open.
  bool register_layout(std::uint64_t bytes) {
    auto answered = ask_layout(bytes, 0);
    if (!answered || answered->message.body.type != wire::Body::LayoutReply) return false;
    const wire::LayoutReplyT& reply = *answered->message.body.AsLayoutReply();
    slot_bytes_ = reply.slot_bytes;
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
  std::optional<wire::SlotOfferT> offer_;  // The newest.
  wire::SaveEndedT ended_;
  bool has_ended_ = false;
};

class HostileClient : public ::testing::Test {
 protected:
  void SetUp() override {
    daemon_ = std::make_unique<DaemonProcess>(scratch_.path("socket"));
    ASSERT_TRUE(daemon_->wait_listening());
    good_ = std::make_unique<Trainer>(scratch_.path("good"), scratch_.path("socket"), 2);
    ASSERT_EQ(good_->attach(), SF_OK) << good_->error().message;
  }
  // After whatever the test did.
  void TearDown() override {
    EXPECT_EQ(good_->save_durable(1), SF_OK) << good_->error().message;
    good_.reset();
    EXPECT_EQ(daemon_->stop(), 0);
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

TEST_F(HostileClient, that_sends_garbage_is_dropped) {
  const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, scratch_.path("socket").c_str(), sizeof address.sun_path - 1);
  ASSERT_EQ(::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  SystemRng rng;
  std::vector<std::uint64_t> noise(64);
  for (std::uint64_t& word : noise) word = rng.next();
  ASSERT_GT(::send(fd, noise.data(), noise.size() * 8, MSG_NOSIGNAL), 0);
  char byte = 0;
  EXPECT_EQ(::recv(fd, &byte, 1, 0), 0) << "not dropped; first word " << noise[0];
  (void)::close(fd);
}

TEST_F(HostileClient, that_does_not_begin_with_hello_is_dropped) {
  auto peer = connected();
  peer->send(wire::StatusT());
  EXPECT_TRUE(peer->is_dropped());
}

TEST_F(HostileClient, that_speaks_as_a_daemon_is_dropped) {
  auto peer = connected();
  ASSERT_TRUE(peer->hello());
  peer->send(wire::DoneT());
  EXPECT_TRUE(peer->is_dropped());
}

TEST_F(HostileClient, of_another_protocol_version_is_told_so) {
  auto peer = connected();
  wire::HelloT hello;
  hello.protocol_version = 999;
  auto answered = peer->ask(std::move(hello));
  ASSERT_TRUE(answered);
  ASSERT_EQ(answered->message.body.type, wire::Body::Failure);
  EXPECT_NE(answered->message.body.AsFailure()->message.find("999"), std::string::npos);
}

TEST_F(HostileClient, with_a_relative_or_a_poisoned_run_path_is_refused) {
  for (const std::string& path : {std::string("relative"), std::string(),
                                  std::string("/tmp/a\0b", 8), "/" + std::string(5000, 'a')}) {
    auto peer = connected();
    ASSERT_TRUE(peer->hello());
    auto answered = peer->attach(path);
    ASSERT_TRUE(answered);
    EXPECT_EQ(answered->message.body.type, wire::Body::Failure) << path;
  }
}

TEST_F(HostileClient, that_attaches_to_anothers_run_is_refused) {
  auto peer = connected();
  ASSERT_TRUE(peer->hello());
  auto answered = peer->attach(scratch_.path("good"));
  ASSERT_TRUE(answered);
  ASSERT_EQ(answered->message.body.type, wire::Body::Failure);
  EXPECT_NE(answered->message.body.AsFailure()->message.find("one trainer"), std::string::npos);
}

TEST_F(HostileClient, that_lies_about_its_layouts_size_is_refused) {
  auto peer = attached();
  for (const std::int64_t lie_bytes : {-1, 1, 1'000'000}) {
    auto answered = peer->ask_layout(1000, lie_bytes);
    ASSERT_TRUE(answered);
    EXPECT_EQ(answered->message.body.type, wire::Body::Failure) << lie_bytes;
  }
}

TEST_F(HostileClient, that_asks_for_more_memory_than_there_is_is_refused) {
  auto peer = attached();
  auto answered = peer->ask_layout(std::uint64_t{1} << 50, 0);
  ASSERT_TRUE(answered);
  ASSERT_EQ(answered->message.body.type, wire::Body::Failure);
  EXPECT_NE(answered->message.body.AsFailure()->message.find("arena"), std::string::npos);
}

TEST_F(HostileClient, that_publishes_an_extent_its_layout_lacks_is_dropped) {
  auto peer = capturing();
  ASSERT_TRUE(peer->ring().publish(
      {.ticket = peer->ticket(), .part = 7, .extent = 0, .hash = 0, .reserved = 0}));
  EXPECT_TRUE(peer->is_dropped());
}

TEST_F(HostileClient, that_publishes_an_extent_twice_is_dropped) {
  auto peer = capturing();
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(peer->ring().publish(
        {.ticket = peer->ticket(), .part = 0, .extent = 0, .hash = 0, .reserved = 0}));
  }
  EXPECT_TRUE(peer->is_dropped());
}

TEST_F(HostileClient, that_ends_a_capture_with_extents_missing_is_dropped) {
  auto peer = capturing();
  peer->end_capture();
  EXPECT_TRUE(peer->is_dropped());
}

TEST_F(HostileClient, whose_bytes_differ_from_its_hashes_gets_no_checkpoint) {
  auto peer = capturing();
  peer->publish(1);
  peer->end_capture();
  auto ended = peer->ended();
  ASSERT_TRUE(ended);
  ASSERT_NE(ended->failure, nullptr);
  EXPECT_EQ(shm::from_wire(*ended->failure).code(), Code::kDataLoss) << ended->failure->message;
  EXPECT_TRUE(judge(scratch_.path("bad")).steps.empty());
}

TEST_F(HostileClient, whose_header_is_not_its_layouts_gets_no_checkpoint) {
  auto peer = capturing();
  const format::PartImage& image = peer->plan().parts[0];
  for (std::uint32_t i = 0; i < peer->plan().extent_counts[0]; ++i) {
    const std::uint64_t offset = i * kExtentBytes;
    const std::uint64_t bytes = std::min<std::uint64_t>(kExtentBytes, image.bytes - offset);
    ASSERT_TRUE(peer->ring().publish({.ticket = peer->ticket(),
                                      .part = 0,
                                      .extent = i,
                                      .hash = hash_extent(peer->slot().subspan(offset, bytes)),
                                      .reserved = 0}));
  }
  peer->end_capture();
  auto ended = peer->ended();
  ASSERT_TRUE(ended);
  ASSERT_NE(ended->failure, nullptr);
  EXPECT_NE(ended->failure->message.find("header"), std::string::npos);
}

TEST_F(HostileClient, that_is_honest_after_all_is_served) {
  auto peer = capturing();
  peer->publish(0);
  peer->end_capture();
  auto ended = peer->ended();
  ASSERT_TRUE(ended);
  EXPECT_EQ(ended->failure, nullptr);
}

TEST_F(HostileClient, that_takes_the_slot_on_offer_is_served_without_an_answer) {
  auto peer = attached();
  ASSERT_TRUE(peer->register_layout(2'500'000));
  ASSERT_TRUE(peer->presume_offer());
  const std::uint64_t sequence = peer->offer()->sequence;
  peer->take_offer(peer->ticket());
  peer->publish(0);
  peer->end_capture();
  auto ended = peer->ended();
  ASSERT_TRUE(ended);
  EXPECT_EQ(ended->failure, nullptr) << ended->failure->message;
  EXPECT_EQ(ended->ticket, peer->ticket());
  EXPECT_EQ(ended->sequence, sequence);
}

TEST_F(HostileClient, whose_ring_is_seen_before_it_takes_the_offer_is_served) {
  auto peer = attached();
  ASSERT_TRUE(peer->register_layout(2'500'000));
  ASSERT_TRUE(peer->presume_offer());
  peer->publish(0);
  // The daemon answers in its turn, after it has seen the ring.
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(peer->ask(wire::StatusT()));
  peer->take_offer(peer->ticket());
  peer->end_capture();
  auto ended = peer->ended();
  ASSERT_TRUE(ended);
  EXPECT_EQ(ended->failure, nullptr) << ended->failure->message;
}

TEST_F(HostileClient, that_publishes_more_than_its_layout_before_it_takes_the_offer_is_dropped) {
  auto peer = attached();
  ASSERT_TRUE(peer->register_layout(2'500'000));
  ASSERT_TRUE(peer->presume_offer());
  for (std::uint32_t i = 0; i <= peer->plan().extent_count; ++i) {
    ASSERT_TRUE(peer->ring().publish(
        {.ticket = peer->ticket(), .part = 0, .extent = 0, .hash = 0, .reserved = 0}));
  }
  EXPECT_TRUE(peer->is_dropped());
}

TEST_F(HostileClient, that_takes_a_ticket_that_is_not_on_offer_is_dropped) {
  auto peer = attached();
  ASSERT_TRUE(peer->register_layout(2'500'000));
  ASSERT_TRUE(peer->presume_offer());
  peer->take_offer(peer->ticket() + 1);
  EXPECT_TRUE(peer->is_dropped());
}

TEST_F(HostileClient, that_asks_although_a_slot_is_on_offer_ends_the_offer) {
  auto peer = attached();
  ASSERT_TRUE(peer->register_layout(2'500'000));
  ASSERT_TRUE(peer->presume_offer());
  const std::uint64_t sequence = peer->offer()->sequence;
  const std::uint64_t offered = peer->ticket();
  ASSERT_TRUE(peer->begin_save());
  EXPECT_NE(peer->ticket(), offered);
  peer->publish(0);
  peer->end_capture();
  auto ended = peer->ended();
  ASSERT_TRUE(ended);
  EXPECT_EQ(ended->failure, nullptr) << ended->failure->message;
  EXPECT_EQ(ended->sequence, sequence) << "an offer that nobody takes uses no sequence up";
  peer->take_offer(offered);
  EXPECT_TRUE(peer->is_dropped());
}

TEST_F(HostileClient, that_changes_its_run_while_it_captures_is_served) {
  auto peer = capturing();
  peer->publish(0);
  peer->end_capture();
  auto first = peer->ended();
  ASSERT_TRUE(first && first->failure == nullptr);

  // The I/O thread is in this save until its capture ends, and cannot make the changes before.
  ASSERT_TRUE(peer->begin_save());
  wire::SetTagT change;
  change.run_path = scratch_.path("bad");
  change.tag = "kept";
  change.sequence = first->sequence;
  std::vector<std::uint64_t> changes;
  for (int i = 0; i < 4; ++i) changes.push_back(peer->send(change));
  auto refused = peer->answer(changes[3]);
  ASSERT_TRUE(refused) << "the fourth waits, and the capture's end behind it";
  ASSERT_EQ(refused->message.body.type, wire::Body::Failure) << "more than three at a time";
  EXPECT_EQ(shm::from_wire(*refused->message.body.AsFailure()).code(), Code::kUnavailable);

  peer->publish(0);
  peer->end_capture();
  for (std::size_t i = 0; i < 3; ++i) {
    auto answered = peer->answer(changes[i]);
    ASSERT_TRUE(answered) << "the capture's end waits behind change " << i;
    EXPECT_EQ(answered->message.body.type, wire::Body::Done) << i;
  }
  auto second = peer->ended();
  ASSERT_TRUE(second);
  EXPECT_EQ(second->failure, nullptr);
}

TEST_F(HostileClient, that_opens_many_connections_leaves_room_for_the_good_one) {
  std::vector<UniqueFd> flood;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, scratch_.path("socket").c_str(), sizeof address.sun_path - 1);
  int connected_count = 0;
  for (int i = 0; i < 300; ++i) {
    flood.emplace_back(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    // EAGAIN when the daemon has not accepted as fast as we connect: as good as a refusal.
    if (::connect(flood.back().get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) {
      ++connected_count;
    }
  }
  EXPECT_GT(connected_count, 64) << "fewer than the daemon serves: not a flood";
  EXPECT_EQ(good_->save_durable(1), SF_OK) << good_->error().message;
  flood.clear();
  // The daemon notices the ends one by one; until then it refuses the sixty-fifth.
  int attached = SF_UNAVAILABLE;
  for (int i = 0; i < 100 && attached != SF_OK; ++i) {
    Trainer late(scratch_.path("late"), scratch_.path("socket"), 1);
    attached = late.attach();
    if (attached != SF_OK) (void)::usleep(50'000);
  }
  EXPECT_EQ(attached, SF_OK);
}

}  // namespace
}  // namespace stillframe::testing
