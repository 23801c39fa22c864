#include <sys/mman.h>

#include <cstring>

#include "base/check.h"
#include "base/mapping.h"
#include "shm/ring.h"
#include "tests/fuzz/targets.h"

namespace stillframe::fuzz {

namespace {

constexpr std::size_t kMemoryBytes = 4096;
constexpr std::size_t kRecordsOffset = 128;

}  // namespace

// Each chunk is what a client may have written by the time that the daemon looks.
bool ring_records(ConstBytes input) {
  constexpr std::size_t kChunkBytes = 8 + sizeof(shm::ExtentRecord);
  if (input.size() < 1 + kChunkBytes) return false;
  const auto capacity = std::uint32_t{1} << (std::to_integer<unsigned>(input[0]) % 7);
  input = input.subspan(1);
  auto ring = shm::RingConsumer::create(capacity);
  check(ring.has_value(), "a capacity that is a power of two is one");
  void* const address =
      ::mmap(nullptr, kMemoryBytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring->memory_fd(), 0);
  check(address != MAP_FAILED, "the ring's memory can be mapped");
  const Mapping mapping(address, kMemoryBytes);
  bool is_accepted = false;
  std::uint64_t tail = 0;
  for (; input.size() >= kChunkBytes; input = input.subspan(kChunkBytes)) {
    // A step of the tail, rather than a tail: most of 2^64 is refused at once.
    const std::uint64_t step = load_u64(input.data());
    std::memcpy(
        mapping.bytes().data() + kRecordsOffset + tail % capacity * sizeof(shm::ExtentRecord),
        input.data() + 8, sizeof(shm::ExtentRecord));
    tail += step;
    std::memcpy(mapping.bytes().data(), &tail, sizeof tail);
    const auto records = ring->take();
    if (!records) {
      check(records.error().code() == Code::kInvalidArgument, "a peer's fault");
      return is_accepted;
    }
    check(records->size() <= capacity, "no more records than there are places");
    check(records->size() == step, "as many as the tail went on");
    for (const auto& record : *records) check(record.reserved == 0, "judged before handed on");
    is_accepted = is_accepted || !records->empty();
  }
  return is_accepted;
}

}  // namespace stillframe::fuzz
