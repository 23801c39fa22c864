#include "shm/ring.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstring>
#include <thread>

#include "base/check.h"
#include "base/hash.h"
#include "shm/arena.h"
#include "tests/format/seed.h"

namespace stillframe::shm {
namespace {

UniqueFd Duplicate(int fd) { return UniqueFd(::fcntl(fd, F_DUPFD_CLOEXEC, 0)); }

RingConsumer Made(std::uint32_t capacity) {
  auto ring = RingConsumer::create(capacity);
  check(ring.has_value(), "a small ring can be made");
  return std::move(*ring);
}

Result<RingProducer> ProducerOf(const RingConsumer& ring, std::uint32_t capacity) {
  return RingProducer::open(Duplicate(ring.memory_fd()), Duplicate(ring.event_fd()), capacity);
}

// The bytes of a ring as a client that keeps to no rule sees them.
class RawRing {
 public:
  explicit RawRing(const RingConsumer& ring)
      : mapping_(::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring.memory_fd(), 0),
                 kBytes) {}
  void SetTail(std::uint64_t tail) {
    std::atomic_ref(*reinterpret_cast<std::uint64_t*>(at(0))).store(tail);
  }
  std::uint64_t Tail() { return load_u64(at(0)); }
  std::uint64_t Head() { return load_u64(at(64)); }
  std::byte* at(std::size_t offset) { return mapping_.bytes().data() + offset; }

 private:
  static constexpr std::size_t kBytes = 4096;
  Mapping mapping_;
};

ExtentRecord RecordNumber(std::uint64_t number) {
  return {.ticket = number / 1000,
          .part = static_cast<std::uint32_t>(number % 7),
          .extent = static_cast<std::uint32_t>(number),
          .hash = number * 0x9e3779b97f4a7c15};
}

bool WaitForSignal(const RingConsumer& ring, int timeout_ms = 60'000) {
  pollfd wanted = {ring.event_fd(), POLLIN, 0};
  return ::poll(&wanted, 1, timeout_ms) == 1;
}

Code RefusalOfTake(RingConsumer& ring) {
  const auto records = ring.take();
  EXPECT_FALSE(records);
  return records ? Code::kInternal : records.error().code();
}

TEST(Ring, capacity_is_a_power_of_two_of_twice_the_extents) {
  EXPECT_EQ(ring_capacity_for(0), 64U);
  EXPECT_EQ(ring_capacity_for(1), 64U);
  EXPECT_EQ(ring_capacity_for(32), 64U);
  EXPECT_EQ(ring_capacity_for(33), 128U);
  EXPECT_EQ(ring_capacity_for(65'536), 131'072U);
  EXPECT_EQ(ring_capacity_for(~std::uint64_t{0}), std::uint32_t{1} << 26);
}

TEST(Ring, of_another_capacity_is_refused) {
  for (const std::uint32_t capacity : {0U, 3U, 63U, 65U, 1U << 27U, ~0U}) {
    EXPECT_FALSE(RingConsumer::create(capacity)) << capacity;
  }
  const RingConsumer ring = Made(64);
  EXPECT_TRUE(ProducerOf(ring, 64));
  for (const std::uint32_t capacity : {0U, 63U, 1024U, ~0U}) {
    const auto producer = ProducerOf(ring, capacity);
    ASSERT_FALSE(producer) << capacity;
    EXPECT_EQ(producer.error().code(), Code::kInvalidArgument);
  }
}

TEST(Ring, is_not_opened_from_memory_whose_length_can_change) {
  const UniqueFd memory(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(::ftruncate(memory.get(), 4096), 0);
  const auto producer = RingProducer::open(Duplicate(memory.get()), UniqueFd(), 64);
  ASSERT_FALSE(producer);
  EXPECT_EQ(producer.error().code(), Code::kInvalidArgument);
}

TEST(Ring, carries_records_in_their_order) {
  RingConsumer ring = Made(64);
  auto producer = ProducerOf(ring, 64);
  ASSERT_TRUE(producer);
  EXPECT_TRUE(ring.take()->empty());
  for (std::uint64_t i = 0; i < 5; ++i) ASSERT_TRUE(producer->publish(RecordNumber(i)));
  const auto records = ring.take();
  ASSERT_TRUE(records);
  ASSERT_EQ(records->size(), 5U);
  for (std::uint64_t i = 0; i < 5; ++i) EXPECT_EQ((*records)[i], RecordNumber(i));
  EXPECT_TRUE(ring.take()->empty());
}

TEST(Ring, has_the_bytes_of_its_table) {
  RingConsumer ring = Made(64);
  auto producer = ProducerOf(ring, 64);
  ASSERT_TRUE(producer->publish({.ticket = 1, .part = 2, .extent = 3, .hash = 4}));
  RawRing raw(ring);
  EXPECT_EQ(raw.Tail(), 1U);
  EXPECT_EQ(raw.Head(), 0U);
  EXPECT_EQ(load_u64(raw.at(128)), 1U);
  EXPECT_EQ(load_u64(raw.at(136)), std::uint64_t{3} << 32U | 2U);
  EXPECT_EQ(load_u64(raw.at(144)), 4U);
  EXPECT_EQ(load_u64(raw.at(152)), 0U);
  ASSERT_TRUE(ring.take());
  EXPECT_EQ(raw.Head(), 1U);
}

TEST(Ring, signals_what_it_publishes) {
  RingConsumer ring = Made(64);
  auto producer = ProducerOf(ring, 64);
  EXPECT_FALSE(WaitForSignal(ring, 0));
  ASSERT_TRUE(producer->publish({}));
  EXPECT_TRUE(WaitForSignal(ring));
  ring.clear_event();
  EXPECT_FALSE(WaitForSignal(ring, 0));
  ring.clear_event();  // Never blocks.
}

TEST(Ring, that_is_full_says_so_and_goes_on_after_it_was_emptied) {
  RingConsumer ring = Made(64);
  auto producer = ProducerOf(ring, 64);
  std::uint64_t number = 0;
  for (; number < 64; ++number) ASSERT_TRUE(producer->publish(RecordNumber(number)));
  const auto full = producer->publish(RecordNumber(number));
  ASSERT_FALSE(full);
  EXPECT_EQ(full.error().code(), Code::kInternal);
  EXPECT_EQ(ring.take()->size(), 64U);
  // Over the end of the memory and back at its start.
  ASSERT_TRUE(producer->publish(RecordNumber(number)));
  EXPECT_EQ(ring.take()->at(0), RecordNumber(number));
}

TEST(Ring, whose_tail_ran_ahead_is_refused) {
  for (const std::uint64_t tail : {std::uint64_t{65}, std::uint64_t{1} << 32, ~std::uint64_t{0}}) {
    RingConsumer ring = Made(64);
    RawRing(ring).SetTail(tail);
    EXPECT_EQ(RefusalOfTake(ring), Code::kInvalidArgument) << tail;
  }
  RingConsumer ring = Made(64);
  RawRing(ring).SetTail(64);
  EXPECT_EQ(ring.take()->size(), 64U) << "as far as it may";
}

TEST(Ring, whose_tail_went_backwards_is_refused) {
  RingConsumer ring = Made(64);
  RawRing raw(ring);
  raw.SetTail(10);
  ASSERT_EQ(ring.take()->size(), 10U);
  raw.SetTail(9);
  EXPECT_EQ(RefusalOfTake(ring), Code::kInvalidArgument);
}

TEST(Ring, does_not_believe_a_head_that_the_client_wrote) {
  RingConsumer ring = Made(64);
  RawRing raw(ring);
  raw.SetTail(10);
  ASSERT_EQ(ring.take()->size(), 10U);
  std::memset(raw.at(64), 0xff, 8);
  raw.SetTail(12);
  EXPECT_EQ(ring.take()->size(), 2U);
  EXPECT_EQ(raw.Head(), 12U);
}

TEST(Ring, whose_reserved_bytes_are_not_zero_is_refused) {
  RingConsumer ring = Made(64);
  auto producer = ProducerOf(ring, 64);
  ASSERT_TRUE(producer->publish({.ticket = 1, .reserved = 1}));
  EXPECT_EQ(RefusalOfTake(ring), Code::kInvalidArgument);
}

TEST(Ring, whose_daemon_lies_about_the_head_is_full) {
  RingConsumer ring = Made(64);
  auto producer = ProducerOf(ring, 64);
  std::memset(RawRing(ring).at(64), 0x7f, 8);
  const auto status = producer->publish({});
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code(), Code::kInternal);
}

// The sanitizer run of this test says whether the two sides race.
TEST(Ring, brings_a_million_records_from_thread_to_thread) {
  constexpr std::uint64_t kCount = 1'000'000;
  constexpr std::uint32_t kCapacity = 1024;
  RingConsumer ring = Made(kCapacity);
  auto producer = ProducerOf(ring, kCapacity);
  ASSERT_TRUE(producer);
  // How much the consumer has taken, so that the producer never meets a full ring.
  std::atomic<std::uint64_t> taken_count = 0;
  std::thread client([&] {
    for (std::uint64_t i = 0; i < kCount; ++i) {
      for (auto taken = taken_count.load(); i - taken >= kCapacity; taken = taken_count.load()) {
        taken_count.wait(taken);
      }
      check(producer->publish(RecordNumber(i)).has_value(), "there is room");
    }
  });
  std::uint64_t next = 0;
  bool is_right = true;
  while (next < kCount && is_right) {
    ASSERT_TRUE(WaitForSignal(ring));
    ring.clear_event();
    const auto records = ring.take();
    ASSERT_TRUE(records) << records.error().message();
    for (const ExtentRecord& record : *records) is_right &= record == RecordNumber(next++);
    taken_count.store(next);
    taken_count.notify_one();
  }
  client.join();
  EXPECT_TRUE(is_right);
  EXPECT_EQ(next, kCount);
  EXPECT_TRUE(ring.take()->empty());
}

// An extent's bytes are there when its record is: what the release and acquire are for (MEM-3).
TEST(Ring, brings_the_bytes_that_its_records_tell_of_from_process_to_process) {
  constexpr std::uint32_t kCapacity = 64;
  constexpr std::uint64_t kExtentCount = 32;
  constexpr std::size_t kBytes = 4096;
  RingConsumer ring = Made(kCapacity);
  const auto arena = Arena::create(kHugePageBytes);
  ASSERT_TRUE(arena);

  const pid_t child = ::fork();
  if (child == 0) {
    // The parent's mappings did not come along; the descriptors did.
    auto own = Arena::adopt(Duplicate(arena->fd()), kHugePageBytes);
    auto producer = ProducerOf(ring, kCapacity);
    if (!own || !producer) ::_exit(1);
    for (std::uint32_t i = 0; i < kExtentCount; ++i) {
      const Bytes extent = own->bytes().subspan(i * kBytes, kBytes);
      for (std::size_t k = 0; k < kBytes; ++k) extent[k] = static_cast<std::byte>(i * 31 + k * 7);
      if (!producer->publish({.ticket = 1, .extent = i, .hash = hash64(extent)})) ::_exit(2);
    }
    ::_exit(0);
  }
  std::uint32_t next = 0;
  while (next < kExtentCount) {
    ASSERT_TRUE(WaitForSignal(ring)) << "the child published " << next;
    ring.clear_event();
    const auto records = ring.take();
    ASSERT_TRUE(records);
    for (const ExtentRecord& record : *records) {
      ASSERT_EQ(record.extent, next);
      EXPECT_EQ(hash64(arena->bytes().subspan(next * kBytes, kBytes)), record.hash);
      ++next;
    }
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

// SHM-1: what was judged and what is handed on are one read.
TEST(Ring, hands_on_the_record_that_it_judged_while_the_client_flips_it) {
  constexpr std::uint32_t kCapacity = 64;
  constexpr int kRingCount = 500;
  constexpr std::uint64_t kTakeCountMax = 1'000;
  std::uint64_t taken_count = 0;
  std::uint64_t fooled_count = 0;
  int refused_count = 0;
  for (int i = 0; i < kRingCount; ++i) {
    RingConsumer ring = Made(kCapacity);
    RawRing raw(ring);
    std::atomic<bool> has_begun = false;
    std::atomic<bool> stop = false;
    std::thread client([&] {
      std::atomic_ref reserved(
          *reinterpret_cast<std::uint64_t*>(raw.at(128 + offsetof(ExtentRecord, reserved))));
      // Each value stays for a moment, or the consumer would see almost only one of them.
      for (std::uint64_t n = 0; !stop; ++n) {
        reserved.store(n / 64 % 2, std::memory_order_relaxed);
        has_begun = true;
      }
    });
    while (!has_begun) std::this_thread::yield();
    // A refusal is the end, as it is for a client.
    for (std::uint64_t round = 1; round <= kTakeCountMax; ++round) {
      raw.SetTail(round * kCapacity);
      const auto records = ring.take();
      if (!records) {
        ++refused_count;
        break;
      }
      ++taken_count;
      for (const ExtentRecord& record : *records) {
        if (record.reserved != 0) ++fooled_count;
      }
    }
    stop = true;
    client.join();
  }
  std::cout << taken_count << " taken, " << refused_count << " refused\n";
  EXPECT_GT(taken_count, 0U);
  EXPECT_GT(refused_count, 0);
  EXPECT_EQ(fooled_count, 0U);
}

TEST(Ring, survives_a_client_that_writes_anything_at_any_time) {
  constexpr std::uint32_t kCapacity = 64;
  std::mt19937_64 random = format::seeded_generator();
  std::atomic<bool> stop = false;
  std::uint64_t refused_count = 0;
  std::uint64_t record_count = 0;
  for (int round = 0; round < 20; ++round) {
    RingConsumer ring = Made(kCapacity);
    RawRing raw(ring);
    stop = false;
    const std::uint64_t seed = random();
    // Everything through the raw mapping, word by word, so that the test itself has no data race.
    std::thread client([&raw, &stop, seed] {
      std::mt19937_64 words(seed);
      std::uint64_t tail = 0;
      while (!stop) {
        tail = words() % 64 == 0 ? words() : tail + words() % 4;
        for (std::size_t offset = 128; offset < 4096; offset += 256) {
          std::atomic_ref(*reinterpret_cast<std::uint64_t*>(raw.at(offset))).store(words());
        }
        raw.SetTail(tail);
      }
    });
    // Sooner or later the tail is a random number.
    while (true) {
      const auto records = ring.take();
      if (!records) {
        EXPECT_EQ(records.error().code(), Code::kInvalidArgument);
        ++refused_count;
        break;
      }
      EXPECT_LE(records->size(), kCapacity);
      record_count += records->size();
    }
    stop = true;
    client.join();
  }
  std::cout << refused_count << " refused, " << record_count << " records\n";
  EXPECT_EQ(refused_count, 20U);
}

}  // namespace
}  // namespace stillframe::shm
