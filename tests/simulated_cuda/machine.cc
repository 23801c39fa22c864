#include "tests/simulated_cuda/machine.h"

#include <sys/mman.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace stillframe::simulated_cuda {

namespace {

constexpr std::size_t kPageBytes = 4096;

std::size_t whole_pages(std::size_t bytes) {
  return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

void* map(std::size_t bytes, int protection) {
  void* const address =
      ::mmap(nullptr, whole_pages(bytes), protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) violate("the machine has no memory left");
  return address;
}

}  // namespace

void violate(const std::string& what) {
  std::fprintf(stderr, "simulated CUDA: %s\n", what.c_str());
  std::abort();
}

// --- Memory --------------------------------------------------------------------------------------

CUdeviceptr Memory::add(Allocation allocation) {
  // Addresses that the host may not touch, and that stay taken when they are freed: what was freed
  // is never mistaken for what came later.
  allocation.begin = reinterpret_cast<CUdeviceptr>(map(allocation.bytes, PROT_NONE));
  allocation.id = next_id_++;
  by_address_[allocation.begin] = allocation;
  if (allocation.kind != Allocation::Kind::kDevice) {
    by_host_[allocation.memory] = allocation.begin;
  }
  return allocation.begin;
}

void Memory::remove(CUdeviceptr begin) {
  const auto found = by_address_.find(begin);
  by_host_.erase(found->second.memory);
  by_address_.erase(found);
}

CUdeviceptr Memory::allocate(int ordinal, std::size_t bytes) {
  if (device_bytes() + bytes > limit_) return 0;
  const std::lock_guard lock(mutex_);
  return add({.kind = Allocation::Kind::kDevice,
              .ordinal = ordinal,
              .bytes = bytes,
              .memory = static_cast<std::byte*>(map(bytes, PROT_READ | PROT_WRITE))});
}

void Memory::free(CUdeviceptr begin) {
  const std::lock_guard lock(mutex_);
  const auto found = by_address_.find(begin);
  if (found == by_address_.end() || found->second.kind != Allocation::Kind::kDevice) {
    violate("cuMemFree of what is no allocation");
  }
  (void)::munmap(found->second.memory, whole_pages(found->second.bytes));
  remove(begin);
}

void* Memory::allocate_host(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  auto* const memory = static_cast<std::byte*>(map(bytes, PROT_READ | PROT_WRITE));
  (void)add({.kind = Allocation::Kind::kHost, .bytes = bytes, .memory = memory});
  return memory;
}

void Memory::free_host(void* memory) {
  const std::lock_guard lock(mutex_);
  const auto found = by_host_.find(memory);
  if (found == by_host_.end() || by_address_.at(found->second).kind != Allocation::Kind::kHost) {
    violate("cuMemFreeHost of what is no allocation");
  }
  (void)::munmap(memory, whole_pages(by_address_.at(found->second).bytes));
  remove(found->second);
}

bool Memory::register_host(void* memory, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  if (by_host_.contains(memory)) return false;
  (void)add({.kind = Allocation::Kind::kRegistered,
             .bytes = bytes,
             .memory = static_cast<std::byte*>(memory)});
  return true;
}

bool Memory::unregister_host(void* memory) {
  const std::lock_guard lock(mutex_);
  const auto found = by_host_.find(memory);
  if (found == by_host_.end()) return false;
  remove(found->second);
  return true;
}

CUdeviceptr Memory::find_host(const void* memory) {
  const std::lock_guard lock(mutex_);
  auto found = by_host_.upper_bound(memory);
  if (found == by_host_.begin()) return 0;
  --found;
  const Allocation& allocation = by_address_.at(found->second);
  const auto offset =
      static_cast<std::size_t>(static_cast<const std::byte*>(memory) - allocation.memory);
  return offset < allocation.bytes ? allocation.begin + offset : 0;
}

bool Memory::look_up(CUdeviceptr address, Allocation& found) {
  const std::lock_guard lock(mutex_);
  auto next = by_address_.upper_bound(address);
  if (next == by_address_.begin()) return false;
  --next;
  if (address - next->second.begin >= next->second.bytes) return false;
  found = next->second;
  return true;
}

Allocation Memory::find(CUdeviceptr address, std::size_t bytes, const char* who) {
  Allocation found;
  if (!look_up(address, found) || bytes > found.bytes - (address - found.begin)) {
    violate(std::string(who) + " touches memory that is no allocation's, or was freed");
  }
  return found;
}

void Memory::limit(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  limit_ = bytes;
}

std::uint64_t Memory::device_bytes() {
  const std::lock_guard lock(mutex_);
  std::uint64_t sum = 0;
  for (const auto& [begin, allocation] : by_address_) {
    if (allocation.kind == Allocation::Kind::kDevice) sum += allocation.bytes;
  }
  return sum;
}

std::uint64_t Memory::host_bytes() {
  const std::lock_guard lock(mutex_);
  std::uint64_t sum = 0;
  for (const auto& [begin, allocation] : by_address_) {
    if (allocation.kind != Allocation::Kind::kDevice) sum += allocation.bytes;
  }
  return sum;
}

// --- Events --------------------------------------------------------------------------------------

std::uint64_t Event::record() {
  const std::lock_guard lock(mutex_);
  return ++recorded_;
}

void Event::reach(std::uint64_t recorded) {
  const std::lock_guard lock(mutex_);
  if (recorded > reached_) reached_ = recorded;
  changed_.notify_all();
}

std::uint64_t Event::recorded() {
  const std::lock_guard lock(mutex_);
  return recorded_;
}

bool Event::is_reached() {
  const std::lock_guard lock(mutex_);
  return reached_ >= recorded_;
}

void Event::wait(std::uint64_t recorded) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return reached_ >= recorded; });
}

// --- Streams -------------------------------------------------------------------------------------

Stream::Stream(int ordinal, std::uint64_t seed)
    : ordinal_(ordinal), random_(seed), thread_([this] { run(); }) {}

Stream::~Stream() {
  {
    const std::lock_guard lock(mutex_);
    is_ending_ = true;
    changed_.notify_all();
  }
  thread_.join();
}

void Stream::enqueue(std::function<void()> work) {
  const std::lock_guard lock(mutex_);
  work_.push_back(std::move(work));
  changed_.notify_all();
}

void Stream::wait_idle() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return work_.empty() && !is_busy_; });
}

void Stream::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return !work_.empty() || is_ending_; });
    if (work_.empty()) return;
    const auto work = std::move(work_.front());
    work_.pop_front();
    is_busy_ = true;
    const std::uint64_t drawn = random_();
    lock.unlock();
    if (drawn % 4 == 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(drawn / 4 % 500));
    }
    work();
    lock.lock();
    is_busy_ = false;
    changed_.notify_all();
  }
}

}  // namespace stillframe::simulated_cuda
