#pragma once

#include <cuda.h>
#include <sys/types.h>

#include <atomic>
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
#include <utility>

// The GPUs behind the entry points of this folder.
namespace stillframe::simulated_cuda {

// Prints why and ends the process: what was done is undefined on a real GPU.
[[noreturn]] void violate(const std::string& what);

// Memory of a GPU that has a descriptor, so that other processes can map it too. It lives until the
// last process has let it go.
struct SharedMemory {
  SharedMemory(int fd, int ordinal, std::size_t bytes, bool is_made_here, bool may_be_shared);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  const int fd;
  const int ordinal;
  const std::size_t bytes;
  const bool is_made_here;
  const bool may_be_shared;
};

// Memory that a GPU can reach.
struct Allocation {
  enum class Kind { kDevice, kHost, kRegistered, kShared, kOpened };
  Kind kind = Kind::kDevice;
  int ordinal = 0;
  std::uint64_t id = 0;
  CUdeviceptr begin = 0;  // The GPU's address; the host has no access there.
  std::size_t bytes = 0;
  std::byte* memory = nullptr;  // The host's.
  std::shared_ptr<SharedMemory> shared = nullptr;
  std::uint64_t heap_offset = 0;            // kDevice.
  std::atomic<pid_t>* opened_by = nullptr;  // kDevice and kOpened: who has it open.
  bool is_accessible = true;
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
  // Violates when the range is not within one allocation, or mapped without a gap.
  Allocation find(CUdeviceptr address, std::size_t bytes, const char* who);
  bool look_up(CUdeviceptr address, Allocation& found);
  // Memory to share, by a number; 0: none left. It is counted until the last mapping here has gone.
  std::uint64_t make_shared(int ordinal, std::size_t bytes, bool may_be_shared);
  // The number of what is mapped there; 0: nothing.
  std::uint64_t find_shared_at(CUdeviceptr address);
  std::uint64_t take_shared(int fd, int ordinal);
  std::shared_ptr<SharedMemory> find_shared(std::uint64_t number);
  bool release_shared(std::uint64_t number);
  // Addresses, and shared memory at them.
  CUdeviceptr reserve(std::size_t bytes);
  // Where the addresses begin that were reserved together with this one, and how many they are.
  std::pair<CUdeviceptr, std::size_t> find_reserved(CUdeviceptr address);
  void unreserve(CUdeviceptr begin, std::size_t bytes);
  bool map_shared(CUdeviceptr begin, std::size_t bytes, std::uint64_t number);
  void unmap_shared(CUdeviceptr begin, std::size_t bytes);
  bool allow(CUdeviceptr begin, std::size_t bytes);
  std::uint64_t shared_count();  // Numbers and reservations.

  // Allocations of other processes.
  bool name(CUdeviceptr begin, CUipcMemHandle& handle);
  CUdeviceptr open(const CUipcMemHandle& handle, int ordinal);
  void close(CUdeviceptr begin);

  void limit(std::uint64_t bytes);
  std::uint64_t limit();
  std::uint64_t device_bytes();
  std::uint64_t host_bytes();

 private:
  CUdeviceptr add(Allocation allocation);
  int heap_locked();
  void remove(CUdeviceptr begin);
  struct Reserved {
    std::size_t bytes = 0;
    std::byte* memory = nullptr;  // The host's: what is mapped side by side is so there too.
  };
  std::map<CUdeviceptr, Reserved>::iterator reserved_at(CUdeviceptr address);

  std::mutex mutex_;
  std::map<CUdeviceptr, Allocation> by_address_;
  std::map<const void*, CUdeviceptr> by_host_;
  std::map<std::uint64_t, std::shared_ptr<SharedMemory>> shared_;
  int heap_ =
      -1;  // A memfd: what GPUs have, each allocation at an offset that is never used again.
  std::uint64_t heap_used_ = 0;
  std::atomic<pid_t>* openers_ = nullptr;
  std::map<CUdeviceptr, Reserved> reserved_;
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
