#pragma once

#include <cuda.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>

// The GPUs behind tests/simulated_cuda/libcuda.cc.
namespace stillframe::simulated_cuda {

// Prints why and ends the process: what was done is undefined on a real GPU.
[[noreturn]] void violate(const std::string& what);

// Memory that a GPU can reach.
struct Allocation {
  enum class Kind { kDevice, kHost, kRegistered };
  Kind kind = Kind::kDevice;
  int ordinal = 0;
  std::uint64_t id = 0;
  CUdeviceptr begin = 0;  // The GPU's address; the host has no access there.
  std::size_t bytes = 0;
  std::byte* memory = nullptr;  // The host's.
};

class Memory {
 public:
  // 0: none left.
  CUdeviceptr allocate(int ordinal, std::size_t bytes);
  void free(CUdeviceptr begin);
  void* allocate_host(std::size_t bytes);
  void free_host(void* memory);
  bool register_host(void* memory, std::size_t bytes);
  bool unregister_host(void* memory);
  // The GPU's address of page-locked memory; 0: it is none.
  CUdeviceptr find_host(const void* memory);
  // Violates when the range is not within one allocation.
  Allocation find(CUdeviceptr address, std::size_t bytes, const char* who);
  bool look_up(CUdeviceptr address, Allocation& found);
  void limit(std::uint64_t bytes);
  std::uint64_t device_bytes();
  std::uint64_t host_bytes();

 private:
  CUdeviceptr add(Allocation allocation);
  void remove(CUdeviceptr begin);

  std::mutex mutex_;
  std::map<CUdeviceptr, Allocation> by_address_;
  std::map<const void*, CUdeviceptr> by_host_;
  std::uint64_t limit_ = std::uint64_t{4} << 30;
  std::uint64_t next_id_ = 1;
};

// Recorded so often, reached so often.
class Event {
 public:
  std::uint64_t record();
  void reach(std::uint64_t recorded);
  std::uint64_t recorded();
  bool is_reached();
  void wait(std::uint64_t recorded);

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t recorded_ = 0;
  std::uint64_t reached_ = 0;
};

// Does its work in order, and pauses now and then, so that streams overtake each other.
class Stream {
 public:
  explicit Stream(int ordinal, std::uint64_t seed);
  ~Stream();
  void enqueue(std::function<void()> work);
  void wait_idle();
  int ordinal() const { return ordinal_; }

 private:
  void run();

  const int ordinal_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;
  bool is_busy_ = false;
  bool is_ending_ = false;
  std::mt19937_64 random_;
  std::thread thread_;
};

}  // namespace stillframe::simulated_cuda
