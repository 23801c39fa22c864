#include "tests/simulated_cuda/machine.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

// Made by this process and still there.
std::atomic<std::uint64_t> shared_bytes = 0;

constexpr std::size_t kOpenersCount = 1U << 16U;
constexpr pid_t kFreed = -1;  // There instead of a process.
constexpr std::size_t kOpenersBytes = kOpenersCount * sizeof(std::atomic<pid_t>);

// Of a process that ends, its memory goes first; it may be seen for a while after that.
bool has_memory(pid_t pid) {
  const std::string path = "/proc/" + std::to_string(pid) + "/statm";
  std::FILE* const file = std::fopen(path.c_str(), "r");
  if (file == nullptr) return false;
  unsigned long pages = 0;
  const bool is_read = std::fscanf(file, "%lu", &pages) == 1;
  std::fclose(file);
  return is_read && pages > 0;
}

void* map_file(int fd, std::uint64_t offset, std::size_t bytes) {
  void* const address = ::mmap(nullptr, whole_pages(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                               static_cast<off_t>(offset));
  if (address == MAP_FAILED) violate("the machine has no memory left");
  return address;
}

}  // namespace

SharedMemory::SharedMemory(int its_fd, int its_ordinal, std::size_t its_bytes, bool is_ours,
                           bool it_may_be_shared)
    : fd(its_fd),
      ordinal(its_ordinal),
      bytes(its_bytes),
      is_made_here(is_ours),
      may_be_shared(it_may_be_shared) {
  if (is_made_here) shared_bytes += bytes;
}

SharedMemory::~SharedMemory() {
  (void)::close(fd);
  if (is_made_here) shared_bytes -= bytes;
}

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
  if (allocation.kind == Allocation::Kind::kHost ||
      allocation.kind == Allocation::Kind::kRegistered) {
    by_host_[allocation.memory] = allocation.begin;
  }
  return allocation.begin;
}

void Memory::remove(CUdeviceptr begin) {
  const auto found = by_address_.find(begin);
  if (const auto host = by_host_.find(found->second.memory);
      host != by_host_.end() && host->second == begin) {
    by_host_.erase(host);
  }
  by_address_.erase(found);
}

// The first pages say for each allocation which other process has it open.
int Memory::heap_locked() {
  if (heap_ >= 0) return heap_;
  heap_ = ::memfd_create("simulated-gpu-heap", MFD_CLOEXEC);
  heap_used_ = kOpenersBytes;
  if (heap_ < 0 || ::ftruncate(heap_, static_cast<off_t>(kOpenersBytes)) != 0) {
    violate("the machine has no memory left");
  }
  openers_ = static_cast<std::atomic<pid_t>*>(map_file(heap_, 0, kOpenersBytes));
  return heap_;
}

CUdeviceptr Memory::allocate(int ordinal, std::size_t bytes) {
  if (device_bytes() + bytes > limit_) return 0;
  const std::lock_guard lock(mutex_);
  const int heap = heap_locked();
  const std::uint64_t offset = heap_used_;
  openers_[next_id_ % kOpenersCount] = 0;
  heap_used_ += whole_pages(bytes);
  if (::ftruncate(heap, static_cast<off_t>(heap_used_)) != 0) {
    violate("the machine has no memory left");
  }
  return add({.kind = Allocation::Kind::kDevice,
              .ordinal = ordinal,
              .bytes = bytes,
              .memory = static_cast<std::byte*>(map_file(heap, offset, bytes)),
              .heap_offset = offset,
              .opened_by = openers_ + next_id_ % kOpenersCount});
}

void Memory::free(CUdeviceptr begin) {
  const std::lock_guard lock(mutex_);
  const auto found = by_address_.find(begin);
  if (found == by_address_.end() || found->second.kind != Allocation::Kind::kDevice) {
    violate("cuMemFree of what is no allocation");
  }
  const Allocation& freed = found->second;
  const pid_t opener = *freed.opened_by;
  if (opener != 0 && has_memory(opener)) {
    violate("cuMemFree of an allocation that another process has open");
  }
  *freed.opened_by = kFreed;
  (void)::munmap(freed.memory, whole_pages(freed.bytes));
  (void)::fallocate(heap_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    static_cast<off_t>(freed.heap_offset),
                    static_cast<off_t>(whole_pages(freed.bytes)));
  remove(begin);
}

namespace {

// What a handle says.
struct Named {
  pid_t pid = 0;
  int heap = -1;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::uint64_t opener = 0;
};

}  // namespace

bool Memory::name(CUdeviceptr begin, CUipcMemHandle& handle) {
  const std::lock_guard lock(mutex_);
  const auto found = by_address_.find(begin);
  if (found == by_address_.end() || found->second.kind != Allocation::Kind::kDevice) return false;
  const Named named = {.pid = ::getpid(),
                       .heap = heap_,
                       .offset = found->second.heap_offset,
                       .bytes = found->second.bytes,
                       .opener = static_cast<std::uint64_t>(found->second.opened_by - openers_)};
  static_assert(sizeof named <= sizeof handle.reserved);
  std::memcpy(handle.reserved, &named, sizeof named);
  return true;
}

CUdeviceptr Memory::open(const CUipcMemHandle& handle, int ordinal) {
  Named named;
  std::memcpy(&named, handle.reserved, sizeof named);
  if (named.pid == ::getpid()) violate("a handle is opened in the process that made it");
  const std::string path =
      "/proc/" + std::to_string(named.pid) + "/fd/" + std::to_string(named.heap);
  char link[64] = {};
  if (::readlink(path.c_str(), link, sizeof link - 1) < 0) return 0;
  if (std::string(link).find("memfd:simulated-gpu-heap") == std::string::npos) return 0;
  if (named.opener >= kOpenersCount || named.bytes == 0) return 0;
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return 0;
  auto* const openers = static_cast<std::atomic<pid_t>*>(map_file(fd, 0, kOpenersBytes));
  if (openers[named.opener] == kFreed) {
    (void)::munmap(openers, kOpenersBytes);
    (void)::close(fd);
    return 0;
  }
  // A driver that gives zeros instead, as was seen of real ones.
  const bool gives_zeros = std::getenv("STILLFRAME_SIMULATED_ZEROS") != nullptr;
  auto* const memory =
      static_cast<std::byte*>(gives_zeros ? map(named.bytes, PROT_READ | PROT_WRITE)
                                          : map_file(fd, named.offset, named.bytes));
  (void)::close(fd);
  openers[named.opener] = ::getpid();
  const std::lock_guard lock(mutex_);
  return add({.kind = Allocation::Kind::kOpened,
              .ordinal = ordinal,
              .bytes = named.bytes,
              .memory = memory,
              .heap_offset = named.opener,
              .opened_by = openers});
}

void Memory::close(CUdeviceptr begin) {
  const std::lock_guard lock(mutex_);
  const auto found = by_address_.find(begin);
  if (found == by_address_.end() || found->second.kind != Allocation::Kind::kOpened) {
    violate("cuIpcCloseMemHandle of what is not open");
  }
  const Allocation& opened = found->second;
  opened.opened_by[opened.heap_offset] = 0;
  (void)::munmap(opened.memory, whole_pages(opened.bytes));
  (void)::munmap(opened.opened_by, kOpenersBytes);
  remove(begin);
}

std::uint64_t Memory::find_shared_at(CUdeviceptr address) {
  Allocation found;
  if (!look_up(address, found) || found.kind != Allocation::Kind::kShared) return 0;
  const std::lock_guard lock(mutex_);
  shared_[next_id_] = found.shared;
  return next_id_++;
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
  bool is_known = look_up(address, found);
  while (is_known && bytes > found.bytes - (address - found.begin)) {
    Allocation next;
    is_known = found.kind == Allocation::Kind::kShared &&
               look_up(found.begin + found.bytes, next) &&
               next.memory == found.memory + found.bytes;
    found.bytes += next.bytes;
    found.is_accessible = found.is_accessible && next.is_accessible;
  }
  if (!is_known) {
    violate(std::string(who) + " touches memory that is no allocation's, or was freed");
  }
  if (!found.is_accessible) violate(std::string(who) + " touches memory before cuMemSetAccess");
  return found;
}

std::uint64_t Memory::make_shared(int ordinal, std::size_t bytes, bool may_be_shared) {
  if (device_bytes() + bytes > limit_) return 0;
  const int fd = ::memfd_create("simulated-gpu", MFD_CLOEXEC);
  if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    violate("the machine has no memory left");
  }
  const std::lock_guard lock(mutex_);
  shared_[next_id_] = std::make_shared<SharedMemory>(fd, ordinal, bytes, true, may_be_shared);
  return next_id_++;
}

std::uint64_t Memory::take_shared(int fd, int ordinal) {
  // As the kernel names a memfd of make_shared().
  char name[64] = {};
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  if (::readlink(link.c_str(), name, sizeof name - 1) < 0) return 0;
  if (std::string(name).find("memfd:simulated-gpu") == std::string::npos) return 0;
  const off_t bytes = ::lseek(fd, 0, SEEK_END);
  const int copy = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (bytes <= 0 || copy < 0) return 0;
  const std::lock_guard lock(mutex_);
  shared_[next_id_] =
      std::make_shared<SharedMemory>(copy, ordinal, static_cast<std::size_t>(bytes), false, true);
  return next_id_++;
}

std::shared_ptr<SharedMemory> Memory::find_shared(std::uint64_t number) {
  const std::lock_guard lock(mutex_);
  const auto found = shared_.find(number);
  return found == shared_.end() ? nullptr : found->second;
}

bool Memory::release_shared(std::uint64_t number) {
  const std::lock_guard lock(mutex_);
  return shared_.erase(number) == 1;
}

CUdeviceptr Memory::reserve(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto begin = reinterpret_cast<CUdeviceptr>(map(bytes, PROT_NONE));
  reserved_[begin] = {.bytes = bytes, .memory = static_cast<std::byte*>(map(bytes, PROT_NONE))};
  return begin;
}

std::map<CUdeviceptr, Memory::Reserved>::iterator Memory::reserved_at(CUdeviceptr address) {
  auto next = reserved_.upper_bound(address);
  if (next == reserved_.begin()) return reserved_.end();
  --next;
  return address - next->first < next->second.bytes ? next : reserved_.end();
}

std::pair<CUdeviceptr, std::size_t> Memory::find_reserved(CUdeviceptr address) {
  const std::lock_guard lock(mutex_);
  const auto found = reserved_at(address);
  if (found == reserved_.end()) return {};
  return {found->first, found->second.bytes};
}

void Memory::unreserve(CUdeviceptr begin, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto found = reserved_.find(begin);
  if (found == reserved_.end() || found->second.bytes != bytes) {
    violate("cuMemAddressFree of what is not reserved");
  }
  const auto mapped = by_address_.lower_bound(begin);
  if (mapped != by_address_.end() && mapped->first < begin + bytes) {
    violate("cuMemAddressFree of addresses that are mapped");
  }
  (void)::munmap(found->second.memory, bytes);
  reserved_.erase(found);  // But never given to anybody else, as in add().
}

bool Memory::map_shared(CUdeviceptr begin, std::size_t bytes, std::uint64_t number) {
  const std::lock_guard lock(mutex_);
  const auto reserved = reserved_at(begin);
  if (reserved == reserved_.end() || reserved->first + reserved->second.bytes < begin + bytes) {
    violate("cuMemMap at addresses that are not reserved");
  }
  const auto shared = shared_.find(number);
  if (shared == shared_.end()) violate("cuMemMap of memory that was released");
  if (bytes != shared->second->bytes) return false;
  void* const memory =
      ::mmap(reserved->second.memory + (begin - reserved->first), bytes, PROT_READ | PROT_WRITE,
             MAP_SHARED | MAP_FIXED, shared->second->fd, 0);
  if (memory == MAP_FAILED) violate("the machine has no memory left");
  by_address_[begin] = {.kind = Allocation::Kind::kShared,
                        .ordinal = shared->second->ordinal,
                        .id = next_id_++,
                        .begin = begin,
                        .bytes = bytes,
                        .memory = static_cast<std::byte*>(memory),
                        .shared = shared->second,
                        .is_accessible = false};
  return true;
}

void Memory::unmap_shared(CUdeviceptr begin, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto found = by_address_.find(begin);
  if (found == by_address_.end() || found->second.kind != Allocation::Kind::kShared ||
      found->second.bytes != bytes) {
    violate("cuMemUnmap of what is not mapped");
  }
  // The place stays reserved.
  if (::mmap(found->second.memory, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
             0) == MAP_FAILED) {
    violate("the machine has no memory left");
  }
  by_address_.erase(found);
}

bool Memory::allow(CUdeviceptr begin, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto found = by_address_.find(begin);
  if (found == by_address_.end() || found->second.bytes != bytes) return false;
  found->second.is_accessible = true;
  return true;
}

std::uint64_t Memory::shared_count() {
  const std::lock_guard lock(mutex_);
  return shared_.size() + reserved_.size();
}

void Memory::limit(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  limit_ = bytes;
}

std::uint64_t Memory::limit() {
  const std::lock_guard lock(mutex_);
  return limit_;
}

std::uint64_t Memory::device_bytes() {
  const std::lock_guard lock(mutex_);
  std::uint64_t sum = shared_bytes;
  for (const auto& [begin, allocation] : by_address_) {
    if (allocation.kind == Allocation::Kind::kDevice) sum += allocation.bytes;
  }
  return sum;
}

std::uint64_t Memory::host_bytes() {
  const std::lock_guard lock(mutex_);
  std::uint64_t sum = 0;
  for (const auto& [begin, allocation] : by_address_) {
    if (allocation.kind == Allocation::Kind::kHost ||
        allocation.kind == Allocation::Kind::kRegistered) {
      sum += allocation.bytes;
    }
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
