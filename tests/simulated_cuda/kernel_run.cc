#include "tests/simulated_cuda/kernel_run.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

namespace stillframe::simulated_cuda {

namespace {

using kernels::kBlockThreads;
using kernels::kSharedBytes;

// The Block of kernels/block.h over simulated memory. The threads of a phase run one after the
// other; that a barrier is missing is found by tests/kernels/host_block.h, which is slower.
class Block {
 public:
  Block(Memory& memory, int ordinal, std::uint64_t index, std::uint64_t count)
      : memory_(memory), ordinal_(ordinal), index_(index), count_(count) {}

  std::uint64_t index() const { return index_; }
  std::uint64_t count() const { return count_; }

  template <class Function>
  void each(Function&& function) {
    for (std::uint32_t thread = 0; thread < kBlockThreads; ++thread) function(thread);
  }
  void barrier() {}

  template <class T>
  using PerThread = std::array<T, kBlockThreads>;
  template <class T>
  void shuffle_across(PerThread<T>& value, std::uint32_t mask) {
    const PerThread<T> before = value;
    for (std::uint32_t thread = 0; thread < kBlockThreads; ++thread) {
      value[thread] = before[thread ^ mask];
    }
  }
  template <class T>
  void add_across(PerThread<T>& value, std::uint32_t mask) {
    const PerThread<T> before = value;
    for (std::uint32_t thread = 0; thread < kBlockThreads; ++thread) {
      value[thread] += before[thread ^ mask];
    }
  }

  class Shared {
   public:
    explicit Shared(std::byte* bytes) : bytes_(bytes) {}
    template <class T>
    T load(std::uint32_t, std::uint32_t offset) const {
      T value = {};
      std::memcpy(&value, bytes_ + offset, sizeof(T));
      return value;
    }
    template <class T>
    void store(std::uint32_t, std::uint32_t offset, const T& value) {
      std::memcpy(bytes_ + offset, &value, sizeof(T));
    }

   private:
    std::byte* bytes_;
  };
  Shared shared() { return Shared(shared_.data()); }

  template <class T>
  T load(const T* source) {
    T value = {};
    std::memcpy(&value, find<T>(source), sizeof(T));
    return value;
  }
  template <class T>
  void store(T* target, const T& value) {
    std::memcpy(find<T>(target), &value, sizeof(T));
  }

 private:
  template <class T>
  std::byte* find(const void* address) {
    const auto at = reinterpret_cast<CUdeviceptr>(address);
    if (at % alignof(T) != 0) violate("a kernel touches memory at a misaligned address");
    for (const Allocation& known : known_) {
      if (at - known.begin <= known.bytes && sizeof(T) <= known.bytes - (at - known.begin)) {
        return known.memory + (at - known.begin);
      }
    }
    known_[next_] = memory_.find(at, sizeof(T), "a kernel");
    const Allocation& found = known_[next_];
    if (found.kind == Allocation::Kind::kDevice && found.ordinal != ordinal_) {
      violate("a kernel touches another GPU's memory");
    }
    next_ = (next_ + 1) % known_.size();
    return found.memory + (at - found.begin);
  }

  Memory& memory_;
  int ordinal_;
  std::uint64_t index_;
  std::uint64_t count_;
  std::array<std::byte, kSharedBytes> shared_{};
  std::array<Allocation, 6> known_{};
  std::size_t next_ = 0;
};

}  // namespace

void run_kernel(Memory& memory, int ordinal, Kernel kernel, const kernels::PackJob& job,
                std::uint64_t blocks, std::mt19937_64& random) {
  std::vector<std::uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0U);
  std::shuffle(order.begin(), order.end(), random);
  for (const std::uint64_t index : order) {
    const auto block = std::make_unique<Block>(memory, ordinal, index, blocks);
    if (kernel == Kernel::kPack) {
      kernels::pack(*block, job);
    } else {
      kernels::unpack(*block, job);
    }
  }
}

}  // namespace stillframe::simulated_cuda
