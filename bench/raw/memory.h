#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

// Memory and threads for the calibrators, which use none of the project's code: they are the
// ceilings that it is measured against.
namespace raw {

// Ends the process: a calibrator that cannot measure has no other answer.
[[noreturn]] void die(const char* doing);

double now_seconds();

// 2 MiB pages where the kernel grants madvise(), faulted in, filled with random bytes that no block
// repeats.
class Memory {
 public:
  explicit Memory(std::size_t bytes, std::uint64_t seed = 1);
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* mapping_ = nullptr;
  std::size_t mapping_bytes_ = 0;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Runs work(0) to work(thread_count - 1) at once, each on a thread pinned to a CPU of its own, and
// returns when all are done. One thread: the caller's, unpinned.
void on_threads(std::size_t thread_count, const std::function<void(std::size_t)>& work);

}  // namespace raw
