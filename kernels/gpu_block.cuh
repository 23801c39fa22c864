#pragma once

#include "kernels/pack.h"

// The Block of block.h on a GPU: nvcc only.
namespace stillframe::kernels {

class GpuBlock {
 public:
  __device__ explicit GpuBlock(std::byte* shared) : shared_(shared) {}

  __device__ std::uint64_t index() const { return blockIdx.x; }
  __device__ std::uint64_t count() const { return gridDim.x; }

  template <class Function>
  __device__ __forceinline__ void each(Function&& function) {
    function(std::uint32_t{threadIdx.x});
  }
  __device__ __forceinline__ void barrier() { __syncthreads(); }

  // A register: `thread` is always this one.
  template <class T>
  class PerThread {
   public:
    __device__ __forceinline__ T& operator[](std::uint32_t) { return value_; }

   private:
    T value_ = {};
  };
  template <class T>
  __device__ __forceinline__ void shuffle_across(PerThread<T>& value, std::uint32_t mask) {
    value[0] = __shfl_xor_sync(0xFFFFFFFF, value[0], static_cast<int>(mask));
  }
  template <class T>
  __device__ __forceinline__ void add_across(PerThread<T>& value, std::uint32_t mask) {
    value[0] += __shfl_xor_sync(0xFFFFFFFF, value[0], static_cast<int>(mask));
  }

  class Shared {
   public:
    __device__ explicit Shared(std::byte* bytes) : bytes_(bytes) {}
    template <class T>
    __device__ __forceinline__ T load(std::uint32_t, std::uint32_t offset) const {
      return *reinterpret_cast<const T*>(bytes_ + offset);
    }
    template <class T>
    __device__ __forceinline__ void store(std::uint32_t, std::uint32_t offset, const T& value) {
      *reinterpret_cast<T*>(bytes_ + offset) = value;
    }

   private:
    std::byte* bytes_;
  };
  __device__ __forceinline__ Shared shared() const { return Shared(shared_); }

  template <class T>
  __device__ __forceinline__ T load(const T* source) const {
    __builtin_assume(__isGlobal(source));  // Neither shared nor local: a cheaper instruction.
    return *source;
  }
  template <class T>
  __device__ __forceinline__ void store(T* target, const T& value) {
    __builtin_assume(__isGlobal(target));
    *target = value;
  }

 private:
  std::byte* shared_;
};

}  // namespace stillframe::kernels
