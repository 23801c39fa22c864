#pragma once

// What every entry point of the simulated libcuda.so.1 begins with: the state behind them, their
// handles, and which call is to fail.
#include <cuda.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "tests/simulated_cuda/kernel_run.h"
#include "tests/simulated_cuda/machine.h"

#if !defined(CUDAAPI)
#define CUDAAPI
#endif
#define ENTRY extern "C" __attribute__((visibility("default"))) CUresult CUDAAPI

// What the handles of cuda.h point to.
struct CUctx_st {
  int ordinal = 0;
  std::uint64_t retained = 0;
};
struct CUstream_st {
  CUstream_st(int ordinal, std::uint64_t seed)
      : shared(std::make_shared<stillframe::simulated_cuda::Stream>(ordinal, seed)),
        stream(*shared) {}
  std::shared_ptr<stillframe::simulated_cuda::Stream> shared;
  stillframe::simulated_cuda::Stream& stream;
};
struct CUevent_st {
  std::shared_ptr<stillframe::simulated_cuda::Event> event =
      std::make_shared<stillframe::simulated_cuda::Event>();
};
struct CUfunc_st {
  stillframe::simulated_cuda::Kernel kernel;
};
struct CUmod_st {
  CUfunc_st pack = {stillframe::simulated_cuda::Kernel::kPack};
  CUfunc_st unpack = {stillframe::simulated_cuda::Kernel::kUnpack};
  CUfunc_st copy = {stillframe::simulated_cuda::Kernel::kCopy};
  CUfunc_st trap = {stillframe::simulated_cuda::Kernel::kTrap};
};

namespace stillframe::simulated_cuda {

constexpr int kGpusMax = 8;

// Everything there is. Lives until the process ends, for threads may outlive the destructors.
struct Machine {
  Memory memory;
  std::mutex mutex;
  int gpu_count = 2;             // Of this process.
  std::atomic<int> copy_ms = 0;  // How long a copy to the host takes at least.
  int places[kGpusMax] = {};     // Which of the machine's each of them is.
  bool is_started = false;
  CUctx_st contexts[kGpusMax];
  std::unique_ptr<CUstream_st> default_streams[kGpusMax];
  std::set<void*> handles;
  std::vector<std::weak_ptr<Stream>> streams;  // Of all GPUs.
  std::atomic<std::uint64_t> seed = 1;
  std::atomic<std::uint64_t> launches = 0;
  bool is_recording = false;  // A thread, a graph.
  // Which call is to fail.
  std::uint64_t calls = 0;
  std::string fail_call;
  std::uint64_t fail_in = 0;  // 0: none.
  int fail_result = 0;
  bool fail_is_sticky = false;
  int broken = 0;  // A sticky error.
};

Machine& machine();

// No call works any more.
void break_process();
// Loads what CUDA_INJECTION64_PATH names and calls its InitializeInjection(), as a driver does.
void inject();

// The contexts that a thread has pushed, and what it may do beside one that records a graph.
extern thread_local std::vector<CUcontext> pushed;
extern thread_local CUstreamCaptureMode recording_mode;

// What a call gives before it does anything; CUDA_SUCCESS: it may go on.
CUresult enter(const char* call);

#define ENTER(call)                                                         \
  do {                                                                      \
    if (const CUresult entered = ::stillframe::simulated_cuda::enter(call); \
        entered != CUDA_SUCCESS) {                                          \
      return entered;                                                       \
    }                                                                       \
  } while (false)
#define ENTER_WITH_CONTEXT(call) \
  ENTER(call);                   \
  if (::stillframe::simulated_cuda::pushed.empty()) return CUDA_ERROR_INVALID_CONTEXT

template <class Handle>
Handle add_handle(Handle handle) {
  const std::lock_guard lock(machine().mutex);
  machine().handles.insert(handle);
  return handle;
}

// Both end the process where that is no living handle.
void check_handle(void* handle, const char* what);
void remove_handle(void* handle, const char* what);

CUstream_st& stream_of(CUstream stream);  // nullptr: the default stream of the current context.

bool is_ordinal(int ordinal);

}  // namespace stillframe::simulated_cuda
