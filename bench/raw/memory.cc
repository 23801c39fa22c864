#include "bench/raw/memory.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

namespace raw {

namespace {

constexpr std::size_t kHugeBytes = std::size_t{2} << 20;

std::vector<std::size_t> allowed_cpus() {
  cpu_set_t allowed;
  if (::sched_getaffinity(0, sizeof allowed, &allowed) != 0) die("sched_getaffinity");
  std::vector<std::size_t> cpus;
  for (std::size_t cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
  }
  return cpus;
}

void pin_to(std::size_t cpu) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  if (::pthread_setaffinity_np(::pthread_self(), sizeof one, &one) != 0) die("pin a thread");
}

}  // namespace

void die(const char* doing) {
  std::perror(doing);
  std::exit(2);
}

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Memory::Memory(std::size_t bytes, std::uint64_t seed) : bytes_(bytes) {
  mapping_bytes_ = bytes + 2 * kHugeBytes;
  mapping_ =
      ::mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) die("map memory");
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(mapping_);
  const std::uintptr_t skip_bytes = (kHugeBytes - address % kHugeBytes) % kHugeBytes;
  data_ = static_cast<std::byte*>(mapping_) + skip_bytes;
  (void)::madvise(data_, bytes + kHugeBytes,
                  MADV_HUGEPAGE);  // A wish: the header line says THP's state.
  std::mt19937_64 random(seed);
  for (std::size_t at = 0; at < bytes; at += sizeof(std::uint64_t)) {
    const std::uint64_t value = random();
    std::memcpy(data_ + at, &value, std::min(sizeof value, bytes - at));
  }
}

Memory::~Memory() { (void)::munmap(mapping_, mapping_bytes_); }

void on_threads(std::size_t thread_count, const std::function<void(std::size_t)>& work) {
  if (thread_count == 1) return work(0);
  const std::vector<std::size_t> cpus = allowed_cpus();
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < thread_count; ++i) {
    threads.emplace_back([&cpus, &work, i] {
      pin_to(cpus[i % cpus.size()]);
      work(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace raw
