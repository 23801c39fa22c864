// Clients that lie: each is dropped or refused, and a good trainer beside it is served as before.
#include "tests/daemon/hostile_client.h"

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

namespace stillframe::testing {
namespace {

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
  EXPECT_EQ(shm::from_wire(*refused->message.body.AsFailure()).code(), Code::kResourceExhausted);

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

TEST_F(HostileClient, whose_copier_is_late_for_a_voided_capture_spoils_nothing_of_the_next) {
  auto peer = capturing();
  const std::uint64_t voided = peer->ticket();
  wire::EndCaptureT end;
  end.ticket = voided;
  end.complete = false;
  end.reason = "changed its mind";
  peer->send(std::move(end));
  const auto first = peer->ended();
  ASSERT_TRUE(first);
  EXPECT_NE(first->failure, nullptr);
  ASSERT_TRUE(peer->begin_save());
  EXPECT_TRUE(peer->ring().publish(
      {.ticket = voided, .part = 0, .extent = 0, .hash = 0xBAD, .reserved = 0}));
  peer->publish(0);
  peer->end_capture();
  const auto second = peer->ended();
  ASSERT_TRUE(second) << "dropped for what belonged to another capture";
  EXPECT_EQ(second->failure, nullptr) << second->failure->message;
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
