#include "shm/ring.h"

#include <fcntl.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>

#include "base/os_error.h"
#include "base/text.h"
#include "shm/sealed_memory.h"

namespace stillframe::shm {

namespace {

constexpr std::size_t kTailOffset = 0;
constexpr std::size_t kHeadOffset = 64;  // A cache line away: each side writes only its own.
constexpr std::size_t kRecordsOffset = 128;

// 2^26 records are 2 GiB, enough for a snapshot of 32 TiB.
constexpr std::uint32_t kCapacityMin = 64;
constexpr std::uint32_t kCapacityMax = std::uint32_t{1} << 26;

bool is_capacity(std::uint32_t capacity) {
  return std::has_single_bit(capacity) && capacity <= kCapacityMax;
}

std::uint64_t memory_bytes(std::uint32_t capacity) {
  return round_up(kRecordsOffset + capacity * sizeof(ExtentRecord), kBlockBytes);
}

Error bad_capacity(std::uint32_t capacity) {
  return Error(Code::kInvalidArgument, concat("ring: capacity ", capacity,
                                              ", must be a power of two up to ", kCapacityMax));
}

// The counters are shared with another process, hence lock-free or not at all.
std::atomic_ref<std::uint64_t> counter(const Mapping& mapping, std::size_t offset) {
  static_assert(std::atomic_ref<std::uint64_t>::is_always_lock_free);
  return std::atomic_ref(*reinterpret_cast<std::uint64_t*>(mapping.bytes().data() + offset));
}

std::byte* record_at(const Mapping& mapping, std::uint64_t number, std::uint32_t capacity) {
  return mapping.bytes().data() + kRecordsOffset + number % capacity * sizeof(ExtentRecord);
}

}  // namespace

std::uint32_t ring_capacity_for(std::uint64_t extent_count) {
  const std::uint64_t wanted = std::min<std::uint64_t>(extent_count, kCapacityMax / 2) * 2;
  return std::max(kCapacityMin, static_cast<std::uint32_t>(std::bit_ceil(wanted)));
}

Result<RingConsumer> RingConsumer::create(std::uint32_t capacity) {
  if (!is_capacity(capacity)) return bad_capacity(capacity);
  RingConsumer ring;
  ring.capacity_ = capacity;
  auto memory = make_memfd("stillframe-ring");
  if (!memory) return std::move(memory).error();
  ring.memory_fd_ = std::move(*memory);
  const std::uint64_t bytes = memory_bytes(capacity);
  if (auto sealed = set_length_and_seal(ring.memory_fd(), bytes, kLengthSeals); !sealed) {
    return std::move(sealed).error();
  }
  auto mapping = map_shared(ring.memory_fd(), bytes, kBlockBytes);
  if (!mapping) return std::move(mapping).error();
  ring.mapping_ = std::move(*mapping);
  ring.event_fd_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!ring.event_fd_) return os_error("ring: eventfd", errno);
  return ring;
}

Result<std::vector<ExtentRecord>> RingConsumer::take() {
  // Acquire: the records, and the extents that they tell of, were written before the tail.
  const std::uint64_t tail = counter(mapping_, kTailOffset).load(std::memory_order_acquire);
  const std::uint64_t count = tail - head_;  // Wraps to a huge number when the tail went backwards.
  if (count > capacity_) {
    return Error(Code::kInvalidArgument,
                 concat("ring: tail ", tail, " with head ", head_, " and capacity ", capacity_));
  }
  std::vector<ExtentRecord> records(count);
  for (ExtentRecord& record : records) {
    // The only read: the client can write here at any time (SHM-1).
    std::memcpy(&record, record_at(mapping_, head_, capacity_), sizeof record);
    ++head_;
    if (record.reserved != 0) {
      return Error(Code::kInvalidArgument, concat("ring: reserved bytes are ", record.reserved));
    }
  }
  // Release: the producer may reuse the places only after they were copied.
  counter(mapping_, kHeadOffset).store(head_, std::memory_order_release);
  return records;
}

void RingConsumer::clear_event() noexcept {
  std::uint64_t count = 0;
  // EAGAIN, when nothing was signalled, is as good.
  (void)!::read(event_fd(), &count, sizeof count);
}

Result<RingProducer> RingProducer::open(UniqueFd memory, UniqueFd event, std::uint32_t capacity) {
  if (!is_capacity(capacity)) return bad_capacity(capacity);
  const std::uint64_t bytes = memory_bytes(capacity);
  if (auto fits = check_length_sealed("ring", memory.get(), bytes); !fits) {
    return std::move(fits).error();
  }
  auto mapping = map_shared(memory.get(), bytes, kBlockBytes);
  if (!mapping) return std::move(mapping).error();
  RingProducer ring;
  ring.memory_fd_ = std::move(memory);
  ring.event_fd_ = std::move(event);
  ring.mapping_ = std::move(*mapping);
  ring.capacity_ = capacity;
  ring.tail_ = counter(ring.mapping_, kTailOffset).load(std::memory_order_relaxed);
  return ring;
}

Status RingProducer::publish(const ExtentRecord& record) {
  auto there = put(record);
  return there ? signal() : there;
}

Status RingProducer::put(const ExtentRecord& record) {
  const std::uint64_t head = counter(mapping_, kHeadOffset).load(std::memory_order_acquire);
  if (tail_ - head >= capacity_) {
    return Error(Code::kInternal, concat("ring: full, tail ", tail_, " with head ", head,
                                         " and capacity ", capacity_));
  }
  std::memcpy(record_at(mapping_, tail_, capacity_), &record, sizeof record);
  ++tail_;
  counter(mapping_, kTailOffset).store(tail_, std::memory_order_release);
  return ok();
}

Status RingProducer::signal() {
  const std::uint64_t one = 1;
  ssize_t count = -1;
  do {
    count = ::write(event_fd_.get(), &one, sizeof one);
  } while (count < 0 && errno == EINTR);
  // EAGAIN: 2^64 - 2 signals wait already, so the consumer has been told.
  if (count < 0 && errno != EAGAIN) return os_error("ring: signal", errno);
  return ok();
}

}  // namespace stillframe::shm
