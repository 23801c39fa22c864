#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "kernels/block.h"
#include "kernels/pack.h"

// The Block of kernels/block.h on a CPU: runs the threads of a phase one after the other in a
// random order, and finds what a GPU would leave undefined: shared memory read or written by two
// threads without a barrier between them, and memory that is misaligned or no allocation's.
namespace stillframe::kernels {

// The memory that a launch may touch.
class DeviceMemory {
 public:
  void allow(const void* begin, std::uint64_t bytes) {
    ranges_.emplace_back(reinterpret_cast<std::uintptr_t>(begin), bytes);
  }
  bool holds(const void* address, std::uint64_t bytes) const {
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    return std::any_of(ranges_.begin(), ranges_.end(), [&](const auto& range) {
      return at >= range.first && bytes <= range.second && at - range.first <= range.second - bytes;
    });
  }

 private:
  std::vector<std::pair<std::uintptr_t, std::uint64_t>> ranges_;
};

class HostBlock {
 public:
  HostBlock(const DeviceMemory& memory, std::mt19937_64& random, std::uint64_t index,
            std::uint64_t count)
      : memory_(memory), random_(random), index_(index), count_(count) {
    std::iota(order_.begin(), order_.end(), 0U);
    touched_.resize(kSharedBytes / kTouchedBytes);
  }

  std::uint64_t index() const { return index_; }
  std::uint64_t count() const { return count_; }
  // The first rule that was broken; empty: none.
  const std::string& violation() const { return violation_; }

  template <class Function>
  void each(Function&& function) {
    std::shuffle(order_.begin(), order_.end(), random_);
    for (const std::uint32_t thread : order_) function(thread);
  }
  void barrier() { ++epoch_; }

  template <class T>
  class PerThread {
   public:
    T& operator[](std::uint32_t thread) { return values_[thread]; }

   private:
    std::array<T, kBlockThreads> values_ = {};
  };
  template <class T>
  void shuffle_across(PerThread<T>& value, std::uint32_t mask) {
    PerThread<T> before = value;
    for (std::uint32_t thread = 0; thread < kBlockThreads; ++thread) {
      value[thread] = before[thread ^ mask];
    }
  }
  template <class T>
  void add_across(PerThread<T>& value, std::uint32_t mask) {
    PerThread<T> other = value;
    shuffle_across(other, mask);
    for (std::uint32_t thread = 0; thread < kBlockThreads; ++thread) {
      value[thread] += other[thread];
    }
  }

  class Shared {
   public:
    explicit Shared(HostBlock& block) : block_(block) {}
    template <class T>
    T load(std::uint32_t thread, std::uint32_t offset) const {
      T value = {};
      if (!block_.may_touch<T>(offset)) return value;
      block_.note_read(thread, offset, sizeof(T));
      std::memcpy(&value, block_.shared_.data() + offset, sizeof(T));
      return value;
    }
    template <class T>
    void store(std::uint32_t thread, std::uint32_t offset, const T& value) {
      if (!block_.may_touch<T>(offset)) return;
      block_.note_write(thread, offset, sizeof(T));
      std::memcpy(block_.shared_.data() + offset, &value, sizeof(T));
    }

   private:
    HostBlock& block_;
  };
  Shared shared() { return Shared(*this); }

  template <class T>
  T load(const T* source) {
    T value = {};
    if (is_allowed(source)) std::memcpy(&value, source, sizeof(T));
    return value;
  }
  template <class T>
  void store(T* target, const T& value) {
    if (is_allowed(target)) std::memcpy(target, &value, sizeof(T));
  }

 private:
  // Who read and wrote 4 bytes of shared memory last, and between which barriers. No kernel of ours
  // touches less.
  static constexpr std::uint32_t kTouchedBytes = 4;
  struct Touched {
    std::uint64_t write_epoch = 0;
    std::uint64_t read_epoch = 0;
    std::uint32_t writer = 0;
    std::uint32_t reader = 0;
  };

  void violate(const char* what) {
    if (violation_.empty()) violation_ = what;
  }
  template <class T>
  bool is_allowed(const T* address) {
    if (reinterpret_cast<std::uintptr_t>(address) % alignof(T) != 0) {
      violate("memory of the GPU is touched at a misaligned address");
      return false;
    }
    if (memory_.holds(address, sizeof(T))) return true;
    violate("memory is touched that the launch was not given");
    return false;
  }
  template <class T>
  bool may_touch(std::uint32_t offset) {
    static_assert(sizeof(T) % kTouchedBytes == 0);
    if (offset % alignof(T) == 0 && offset + sizeof(T) <= kSharedBytes) return true;
    violate("shared memory is touched at a misaligned offset or behind its end");
    return false;
  }
  void note_read(std::uint32_t thread, std::uint32_t offset, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; i += kTouchedBytes) {
      Touched& word = touched_[(offset + i) / kTouchedBytes];
      if (word.write_epoch == epoch_ && word.writer != thread) {
        violate("shared memory is read without a barrier behind another thread's store");
      }
      word.read_epoch = epoch_;
      word.reader = thread;
    }
  }
  void note_write(std::uint32_t thread, std::uint32_t offset, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; i += kTouchedBytes) {
      Touched& word = touched_[(offset + i) / kTouchedBytes];
      if ((word.write_epoch == epoch_ && word.writer != thread) ||
          (word.read_epoch == epoch_ && word.reader != thread)) {
        violate("shared memory is stored to without a barrier behind another thread's use of it");
      }
      word.write_epoch = epoch_;
      word.writer = thread;
    }
  }

  const DeviceMemory& memory_;
  std::mt19937_64& random_;
  std::uint64_t index_;
  std::uint64_t count_;
  std::array<std::uint32_t, kBlockThreads> order_{};
  std::array<std::byte, kSharedBytes> shared_{};
  std::vector<Touched> touched_;
  std::uint64_t epoch_ = 1;
  std::string violation_;
};

}  // namespace stillframe::kernels
