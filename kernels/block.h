#pragma once

#include <cstdint>

// What a kernel of ours may ask of the hardware. A kernel is a function template over a Block: one
// block of kBlockThreads threads, in warps of 32. It is written as phases: each() runs a function
// for every thread, and what a thread puts into shared memory may be read by others only behind the
// next barrier(). So the same source runs on a GPU (GpuBlock, gpu_block.cuh) and in tests on a CPU
// (tests/kernels/host_block.h), thread after thread in any order, where a missing barrier is found.
//
// A Block has
//   index(), count()       this block's place in the grid, and the grid's size.
//   each(f)                f(thread) in every thread, 0 to kBlockThreads - 1; no order, no waiting.
//   barrier()              what was stored before it is seen by every thread of the block.
//   PerThread<T>           a variable of each thread: value[thread].
//   add_across(v, mask)    v[t] += v[t ^ mask] for all t of a warp at once; so shuffle_across(v,
//   mask)                  v[t] = v[t ^ mask].
//   shared()               Shared: kSharedBytes that the block's threads have in common, by
//                          load<T>(thread, offset) and store(thread, offset, value), aligned to T.
//   load<T>(p), store(p, value)   memory of the GPU, aligned to T.
namespace stillframe::kernels {

#if defined(__CUDACC__)
#define STILLFRAME_DEVICE __device__ __forceinline__
#define STILLFRAME_DEVICE_TABLE __constant__ const
#define STILLFRAME_UNROLL _Pragma("unroll")  // What it indexes stays in registers.
#else
#define STILLFRAME_DEVICE inline
#define STILLFRAME_DEVICE_TABLE inline constexpr
#define STILLFRAME_UNROLL
#endif

inline constexpr std::uint32_t kWarpThreads = 32;
// As many as make an extent go fast where a launch has few of them (docs/evidence).
inline constexpr std::uint32_t kBlockThreads = 512;

// The widest thing that one instruction moves.
struct alignas(16) Quad {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
};

}  // namespace stillframe::kernels
