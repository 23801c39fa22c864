#pragma once

// The hot path: "extent e of part p of this ticket is in its slot, hash h". Single producer (the
// client), single consumer (the daemon), in a memfd of its own that the daemon makes and seals.
//
//   offset  bytes  field
//        0      8  tail: records ever published; written by the client
//       64      8  head: records ever consumed; written by the daemon
//      128     32  record 0, and so on: `capacity` of them, a power of two
//
//   record:  0  8  ticket
//            8  4  part
//           12  4  extent
//           16  8  hash of the extent
//           24  8  reserved, zero
//
// The capacity is at least twice the extents of one snapshot and one snapshot is captured at a
// time, so a full ring means a broken peer.

#include <cstdint>
#include <vector>

#include "base/mapping.h"
#include "base/result.h"
#include "base/unique_fd.h"

namespace stillframe::shm {

struct ExtentRecord {
  std::uint64_t ticket = 0;
  std::uint32_t part = 0;
  std::uint32_t extent = 0;
  std::uint64_t hash = 0;
  std::uint64_t reserved = 0;
  bool operator==(const ExtentRecord&) const = default;
};
static_assert(sizeof(ExtentRecord) == 32);

std::uint32_t ring_capacity_for(std::uint64_t extent_count);

// Daemon. One thread.
class RingConsumer {
 public:
  // Makes the sealed memfd and the eventfd (non-blocking).
  static Result<RingConsumer> create(std::uint32_t capacity);

  // Takes all records that are there, each copied once into private memory before anybody looks at
  // it. kInvalidArgument: the tail went backwards or ran ahead of the capacity, or reserved bytes
  // are not zero; drop the client.
  Result<std::vector<ExtentRecord>> take();
  // Resets the eventfd; call before take().
  void clear_event() noexcept;

  int memory_fd() const noexcept { return memory_fd_.get(); }
  int event_fd() const noexcept { return event_fd_.get(); }

 private:
  RingConsumer() = default;
  UniqueFd memory_fd_;
  UniqueFd event_fd_;
  Mapping mapping_;
  std::uint32_t capacity_ = 0;
  std::uint64_t head_ = 0;
};

// Client. One thread at a time: copiers publish under their own mutex.
class RingProducer {
 public:
  static Result<RingProducer> open(UniqueFd memory, UniqueFd event, std::uint32_t capacity);

  // Puts a record in, with release order, and signals. The extent's bytes must be globally visible
  // before: non-temporal stores need an sfence (MEM-3). kInternal: the ring is full.
  Status publish(const ExtentRecord& record);
  // The same without the signal, which the next one that is published gives for both.
  Status put(const ExtentRecord& record);

 private:
  RingProducer() = default;
  Status signal();
  UniqueFd memory_fd_;
  UniqueFd event_fd_;
  Mapping mapping_;
  std::uint32_t capacity_ = 0;
  std::uint64_t tail_ = 0;
};

}  // namespace stillframe::shm
