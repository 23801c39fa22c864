// The capture engine over a ring whose other end is read here, and the comparison at publish.
#include "client/capture.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <random>
#include <thread>

#include "base/hash.h"
#include "client/deadline.h"
#include "client/torn_check.h"
#include "tests/client/test_session.h"

namespace stillframe::client {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

// Two parts in a slot, and both ends of a ring.
class Capture : public ::testing::Test {
 protected:
  Capture() : seed_(std::random_device()()), first_({5 * kMiB + 3, 0, 700}), second_({2 * kMiB}) {
    RecordProperty("seed", std::to_string(seed_));
    std::printf("seed %u\n", seed_);
    std::mt19937 random(seed_);
    for (auto* const tensors : {&first_, &second_}) {
      for (std::size_t i = 0; i < tensors->all().size(); ++i) {
        for (auto& byte : tensors->bytes(i)) byte = static_cast<std::uint8_t>(random());
      }
    }
    const sf_part parts[] = {first_.part("model"), second_.part("optimizer")};
    layout_ = *make_layout(parts);
    sources_.emplace(layout_);
    given_ = first_.sources(true);
    for (const sf_source& source : second_.sources(true)) given_.push_back(source);
    EXPECT_TRUE(sources_->fill(given_));
    memory_.resize(layout_->slot_bytes + kHugePageBytes);
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    slot_ =
        Bytes(memory_).subspan(round_up(address, kHugePageBytes) - address, layout_->slot_bytes);
    auto consumer = shm::RingConsumer::create(shm::ring_capacity_for(layout_->extent_count));
    if (consumer) consumer_.emplace(*std::move(consumer));
  }

  void SetUp() override { ASSERT_TRUE(consumer_.has_value()); }

  shm::RingProducer producer() {
    auto made = shm::RingProducer::open(UniqueFd(::dup(consumer_->memory_fd())),
                                        UniqueFd(::dup(consumer_->event_fd())),
                                        shm::ring_capacity_for(layout_->extent_count));
    EXPECT_TRUE(made);
    return *std::move(made);
  }
  CaptureEngine::Job job(std::uint64_t ticket) {
    return {.sources = &*sources_,
            .slot = slot_,
            .kernel = {},
            .ticket = ticket,
            .daemon_ticket = 1000 + ticket};
  }
  static std::chrono::steady_clock::time_point patience() {
    return Deadline::after_ms(20'000).time();
  }
  static CaptureEngine::Progress wait(CaptureEngine& engine, std::uint64_t ticket, bool helps) {
    for (;;) {
      auto progress = engine.step(ticket, helps, patience());
      EXPECT_TRUE(progress) << progress.error().message();
      if (!progress) return CaptureEngine::Progress::kOther;
      if (*progress != CaptureEngine::Progress::kMoved) return *progress;
    }
  }
  // Every extent once, with the hash of what lies in the slot, which is the image.
  void expect_whole(std::uint64_t daemon_ticket) {
    auto records = consumer_->take();
    ASSERT_TRUE(records);
    EXPECT_EQ(records->size(), layout_->extent_count);
    std::map<std::pair<std::uint32_t, std::uint32_t>, std::uint64_t> hashes;
    for (const auto& record : *records) {
      EXPECT_EQ(record.ticket, daemon_ticket);
      hashes[{record.part, record.extent}] = record.hash;
    }
    ASSERT_EQ(hashes.size(), layout_->extent_count);
    for (const auto& [key, hash] : hashes) {
      const LayoutPart& part = layout_->parts[key.first];
      const std::uint64_t begin = std::uint64_t{key.second} * kExtentBytes;
      const std::uint64_t bytes = std::min<std::uint64_t>(kExtentBytes, part.image.bytes - begin);
      EXPECT_EQ(hash, hash_extent(slot_.subspan(part.slot_offset + begin, bytes)));
    }
    for (std::size_t i = 0; i < given_.size(); ++i) {
      const TensorPlace place = layout_->tensors[i];
      const auto& tensor = layout_->tensor(place);
      const Bytes stored =
          slot_.subspan(layout_->parts[place.part].slot_offset + tensor.offset, tensor.bytes);
      if (tensor.bytes == 0) continue;
      EXPECT_EQ(std::memcmp(stored.data(), given_[i].data, tensor.bytes), 0) << tensor.spec.name;
    }
  }

  const unsigned seed_;
  testing::ByteTensors first_;
  testing::ByteTensors second_;
  std::vector<sf_source> given_;
  std::shared_ptr<const Layout> layout_;
  std::optional<CaptureSources> sources_;
  std::vector<std::byte> memory_;
  Bytes slot_;
  std::optional<shm::RingConsumer> consumer_;
};

TEST_F(Capture, tells_the_daemon_of_each_extent_or_of_all_at_the_end) {
  CaptureEngine engine(0);
  engine.set_ring(producer());
  const auto is_told = [this] {
    std::uint64_t signals = 0;
    return ::read(consumer_->event_fd(), &signals, sizeof signals) == sizeof signals;
  };
  auto wanted = job(1);
  for (const bool is_told_at_end : {false, true}) {
    wanted.ticket += 1;
    wanted.daemon_ticket += 1;
    wanted.is_told_at_end = is_told_at_end;
    engine.begin(wanted);
    std::uint64_t told_count = 0;
    for (std::uint64_t i = 0; i < layout_->extent_count; ++i) {
      EXPECT_FALSE(is_told());
      ASSERT_TRUE(engine.step(wanted.ticket, true, patience()));
      if (is_told()) ++told_count;
    }
    EXPECT_EQ(told_count, is_told_at_end ? 1U : layout_->extent_count);
    expect_whole(wanted.daemon_ticket);
    engine.stop(Error(Code::kCancelled, "over"));
  }
}

TEST_F(Capture, puts_every_extent_into_the_slot_once_with_any_number_of_copiers) {
  for (const std::uint32_t copier_count : {0U, 1U, 4U}) {
    CaptureEngine engine(copier_count);
    engine.set_ring(producer());
    for (std::uint64_t ticket = 1; ticket <= 3; ++ticket) {
      std::ranges::fill(slot_, std::byte{0xEE});
      engine.begin(job(ticket));
      std::thread other([&] { (void)wait(engine, ticket, true); });
      EXPECT_EQ(wait(engine, ticket, copier_count < 4), CaptureEngine::Progress::kDone);
      other.join();
      expect_whole(1000 + ticket);
    }
  }
}

TEST_F(Capture, eager_tensors_may_change_once_they_were_copied) {
  for (sf_source& source : given_) source.lazy = 0;
  ASSERT_TRUE(sources_->fill(given_));
  sources_->copy_eager(given_, slot_);
  EXPECT_TRUE(sources_->lazy().empty());
  const auto before = first_.all();
  for (auto& byte : first_.bytes(0)) byte = 0;
  CaptureEngine engine(1);
  engine.set_ring(producer());
  engine.begin(job(1));
  EXPECT_EQ(wait(engine, 1, true), CaptureEngine::Progress::kDone);
  first_.bytes(0) = before[0];
  given_[0].data = first_.bytes(0).data();
  expect_whole(1001);
}

TEST_F(Capture, without_copiers_and_help_nothing_moves_and_patience_ends) {
  CaptureEngine engine(0);
  engine.set_ring(producer());
  engine.begin(job(1));
  auto progress = engine.step(1, false, Deadline::after_ms(20).time());
  ASSERT_TRUE(progress);
  EXPECT_EQ(*progress, CaptureEngine::Progress::kStuck);
  progress = engine.step(2, true, patience());
  ASSERT_TRUE(progress);
  EXPECT_EQ(*progress, CaptureEngine::Progress::kOther);
}

TEST_F(Capture, nobody_touches_the_tensors_after_stop) {
  CaptureEngine engine(4);
  engine.set_ring(producer());
  for (std::uint64_t ticket = 1; ticket <= 20; ++ticket) {
    engine.begin(job(ticket));
    if (ticket % 2 == 0) (void)engine.step(ticket, true, patience());
    engine.stop(Error(Code::kCancelled, "enough"));
    for (auto& byte : first_.bytes(0)) ++byte;  // TSan sees a copier that still reads.
    auto progress = engine.step(ticket, true, patience());
    ASSERT_FALSE(progress);
    EXPECT_EQ(progress.error().message(), "enough");
    ASSERT_TRUE(consumer_->take());
  }
}

TEST_F(Capture, a_full_ring_means_a_broken_peer_and_ends_the_capture) {
  CaptureEngine engine(2);
  engine.set_ring(producer());
  // Nobody reads the ring: it takes two snapshots at least.
  for (std::uint64_t ticket = 1; ticket < 100; ++ticket) {
    engine.begin(job(ticket));
    for (;;) {
      auto progress = engine.step(ticket, true, patience());
      if (!progress) {
        EXPECT_EQ(progress.error().code(), Code::kInternal);
        EXPECT_GT(ticket, 1U);
        return;
      }
      if (*progress == CaptureEngine::Progress::kDone) break;
    }
  }
  FAIL() << "the ring never filled";
}

TEST_F(Capture, the_sample_reaches_every_block_after_some_saves_and_the_full_check_at_once) {
  CaptureEngine engine(1);
  engine.set_ring(producer());
  engine.begin(job(1));
  ASSERT_EQ(wait(engine, 1, true), CaptureEngine::Progress::kDone);
  TornCheck check;
  EXPECT_FALSE(check.find_torn(*sources_, slot_, TornCheck::Extent::kFull));
  EXPECT_FALSE(check.find_torn(*sources_, slot_, TornCheck::Extent::kSample));
  std::mt19937 random(seed_);
  for (int i = 0; i < 10; ++i) {
    const std::size_t offset = random() % first_.bytes(0).size();
    first_.bytes(0)[offset] ^= 0x80;
    const auto found = check.find_torn(*sources_, slot_, TornCheck::Extent::kFull);
    EXPECT_EQ(found.value_or("none"), "tensor.0");
    int turn_count = 0;
    while (!check.find_torn(*sources_, slot_, TornCheck::Extent::kSample) && turn_count < 1000) {
      ++turn_count;
    }
    EXPECT_LT(turn_count, 1000) << "offset " << offset << " is never looked at";
    first_.bytes(0)[offset] ^= 0x80;
  }
}

TEST_F(Capture, the_same_layout_is_known_again_and_any_difference_is_seen) {
  sf_part parts[] = {first_.part("model"), second_.part("optimizer")};
  EXPECT_TRUE(is_same_layout(*layout_, parts));
  EXPECT_FALSE(is_same_layout(*layout_, std::span(parts, 1)));
  parts[1].name = "other";
  EXPECT_FALSE(is_same_layout(*layout_, parts));
  parts[1] = second_.part("optimizer");
  std::vector<sf_tensor> tensors(parts[0].tensors, parts[0].tensors + parts[0].tensor_count);
  parts[0].tensors = tensors.data();
  EXPECT_TRUE(is_same_layout(*layout_, parts));
  tensors[0].dtype = 2;
  EXPECT_FALSE(is_same_layout(*layout_, parts));
  tensors[0].dtype = 1;
  const std::uint64_t other_shape = 1;
  tensors[2].shape = &other_shape;
  EXPECT_FALSE(is_same_layout(*layout_, parts));
  tensors[2] = first_.part().tensors[2];
  const char* const metadata[] = {"format", "pt"};
  parts[0].metadata = metadata;
  parts[0].metadata_count = 1;
  EXPECT_FALSE(is_same_layout(*layout_, parts));
  const auto with_metadata = make_layout(parts);
  ASSERT_TRUE(with_metadata);
  EXPECT_TRUE(is_same_layout(**with_metadata, parts));
}

}  // namespace
}  // namespace stillframe::client
