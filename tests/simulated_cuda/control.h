#pragma once

#include <cstdint>

// How a test reaches into the simulated driver, libcuda.so.1 of this folder. The test is linked
// with it, so that the code under test finds it when it loads the driver by its name.
//
// The driver runs kernels of kernels/ on the CPU, streams as threads with random pauses, device
// memory where the host cannot touch it. What real CUDA leaves undefined ends the process with a
// message: memory that is no allocation's or was freed, a handle that was destroyed. Memory that is
// shared is a memfd, so that it crosses processes.
//
// From the environment, for processes that no test can call as well:
//   STILLFRAME_SIMULATED_GPUS    how many there are, else 2
//   STILLFRAME_SIMULATED_BYTES   as simulated_cuda_limit()
//   STILLFRAME_SIMULATED_FAULT   CALL:NTH:RESULT:STICKY, as simulated_cuda_fail(); any: each call
//   STILLFRAME_SIMULATED_COPY_MS as simulated_cuda_slow()
//   STILLFRAME_SIMULATED_ZEROS   when set, an allocation of another process reads as zeros
//   CUDA_VISIBLE_DEVICES         numbers or UUIDs
//   CUDA_INJECTION64_PATH        a library that is loaded and told when the driver starts
extern "C" {

struct simulated_cuda_counts {
  std::uint64_t calls;  // Of any entry point, since the start.
  std::uint64_t device_bytes;
  std::uint64_t host_bytes;  // Page-locked, allocated or registered.
  std::uint64_t handles;     // Streams, events and modules.
  std::uint64_t launches;
};

// The `nth` call from now on (1: the next) of `call`, or of any when it is empty, does nothing and
// gives `result`. With `is_sticky` so does every later call.
void simulated_cuda_fail(const char* call, std::uint64_t nth, int result, bool is_sticky = false);
// No call fails any more.
void simulated_cuda_heal();
// Of each GPU; allocations behind it fail.
void simulated_cuda_limit(std::uint64_t device_bytes);
// Every copy to the host takes that long at least, from now on.
void simulated_cuda_slow(int copy_ms);
// Whether a thread records a CUDA graph, in the mode that is the default: what others then call in
// their own default mode ends it with an error, here the process.
void simulated_cuda_record(bool is_recording);
simulated_cuda_counts simulated_cuda_count();
}
