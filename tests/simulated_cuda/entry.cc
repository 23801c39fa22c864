#include "tests/simulated_cuda/entry.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "tests/simulated_cuda/control.h"

namespace stillframe::simulated_cuda {

namespace {

// As cuDeviceGetUuid() gives it.
std::string uuid_text(int place) {
  std::string text = "GPU-";
  for (int i = 0; i < 16; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += "5";
    text += std::to_string(place);  // Below kGpusMax.
  }
  return text;
}

// CUDA_VISIBLE_DEVICES: numbers or UUIDs; the first that is neither ends the list.
void see(Machine& all, std::string_view list) {
  int seen = 0;
  while (seen < kGpusMax) {
    const std::string_view word = list.substr(0, list.find(','));
    int place = 0;
    while (place < all.gpu_count && word != uuid_text(place) && word != std::to_string(place)) {
      ++place;
    }
    if (place == all.gpu_count) break;
    all.places[seen++] = place;
    if (word.size() == list.size()) break;
    list.remove_prefix(word.size() + 1);
  }
  all.gpu_count = seen;
}

// What simulated_cuda_fail() is told: "CALL:NTH:RESULT:STICKY".
void plan(Machine& all, const std::string& fault) {
  char call[64] = {};
  unsigned long long nth = 0;
  int result = 0;
  int is_sticky = 0;
  if (std::sscanf(fault.c_str(), "%63[^:]:%llu:%d:%d", call, &nth, &result, &is_sticky) != 4) {
    violate("STILLFRAME_SIMULATED_FAULT=" + fault + ": not CALL:NTH:RESULT:STICKY");
  }
  all.fail_call = std::strcmp(call, "any") == 0 ? "" : call;
  all.fail_in = nth;
  all.fail_result = result;
  all.fail_is_sticky = is_sticky != 0;
}

}  // namespace

Machine& machine() {
  static Machine* const made = [] {
    auto* const fresh = new Machine;
    if (const char* const count = std::getenv("STILLFRAME_SIMULATED_GPUS")) {
      fresh->gpu_count = std::min(std::atoi(count), kGpusMax);
    }
    if (const char* const ms = std::getenv("STILLFRAME_SIMULATED_COPY_MS")) {
      fresh->copy_ms = std::atoi(ms);
    }
    for (int i = 0; i < kGpusMax; ++i) fresh->places[i] = i;
    if (const char* const visible = std::getenv("CUDA_VISIBLE_DEVICES")) see(*fresh, visible);
    if (const char* const bytes = std::getenv("STILLFRAME_SIMULATED_BYTES")) {
      fresh->memory.limit(std::strtoull(bytes, nullptr, 10));
    }
    if (const char* const fault = std::getenv("STILLFRAME_SIMULATED_FAULT")) plan(*fresh, fault);
    for (int i = 0; i < kGpusMax; ++i) fresh->contexts[i].ordinal = i;
    return fresh;
  }();
  return *made;
}

void break_process() {
  const std::lock_guard lock(machine().mutex);
  machine().broken = CUDA_ERROR_LAUNCH_FAILED;
}

void inject() {
  const char* const path = std::getenv("CUDA_INJECTION64_PATH");
  if (path == nullptr) return;
  void* const library = ::dlopen(path, RTLD_NOW);
  if (library == nullptr) violate(std::string("CUDA_INJECTION64_PATH: ") + ::dlerror());
  auto* const begin = reinterpret_cast<int (*)()>(::dlsym(library, "InitializeInjection"));
  if (begin == nullptr) violate("CUDA_INJECTION64_PATH names no library to inject");
  (void)begin();
}

thread_local std::vector<CUcontext> pushed;
thread_local CUstreamCaptureMode recording_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

CUresult enter(const char* call) {
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  ++all.calls;
  if (all.is_recording && recording_mode == CU_STREAM_CAPTURE_MODE_GLOBAL &&
      std::strcmp(call, "cuCtxPushCurrent") != 0 &&
      std::strcmp(call, "cuPointerGetAttributes") != 0) {
    violate(std::string(call) + " ends the recording of a graph by another thread");
  }
  if (all.broken != 0) return static_cast<CUresult>(all.broken);
  if (all.fail_in != 0 && (all.fail_call.empty() || all.fail_call == call) && --all.fail_in == 0) {
    if (all.fail_is_sticky) all.broken = all.fail_result;
    return static_cast<CUresult>(all.fail_result);
  }
  if (!all.is_started && std::strcmp(call, "cuInit") != 0) return CUDA_ERROR_NOT_INITIALIZED;
  return CUDA_SUCCESS;
}

void check_handle(void* handle, const char* what) {
  const std::lock_guard lock(machine().mutex);
  if (!machine().handles.contains(handle)) {
    violate(std::string("use of ") + what + " that was destroyed or never made");
  }
}

void remove_handle(void* handle, const char* what) {
  const std::lock_guard lock(machine().mutex);
  if (machine().handles.erase(handle) == 0) {
    violate(std::string("end of ") + what + " that was destroyed or never made");
  }
}

CUstream_st& stream_of(CUstream stream) {
  if (stream != nullptr) {
    check_handle(stream, "a stream");
    return *stream;
  }
  const int ordinal = pushed.empty() ? 0 : pushed.back()->ordinal;
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  auto& made = all.default_streams[ordinal];
  if (!made) {
    made = std::make_unique<CUstream_st>(ordinal, all.seed++);
    all.streams.push_back(made->shared);
  }
  return *made;
}

bool is_ordinal(int ordinal) { return ordinal >= 0 && ordinal < machine().gpu_count; }

}  // namespace stillframe::simulated_cuda

// --- Control -------------------------------------------------------------------------------------

using stillframe::simulated_cuda::Machine;
using stillframe::simulated_cuda::machine;

#define CONTROL extern "C" __attribute__((visibility("default")))

CONTROL void simulated_cuda_fail(const char* call, std::uint64_t nth, int result, bool is_sticky) {
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  all.fail_call = call;
  all.fail_in = nth;
  all.fail_result = result;
  all.fail_is_sticky = is_sticky;
}

CONTROL void simulated_cuda_heal() {
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  all.fail_in = 0;
  all.broken = 0;
}

CONTROL void simulated_cuda_limit(std::uint64_t device_bytes) {
  machine().memory.limit(device_bytes);
}

CONTROL void simulated_cuda_slow(int copy_ms) { machine().copy_ms = copy_ms; }

CONTROL void simulated_cuda_record(bool is_recording) {
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  all.is_recording = is_recording;
}

CONTROL simulated_cuda_counts simulated_cuda_count() {
  Machine& all = machine();
  simulated_cuda_counts counts = {.calls = 0,
                                  .device_bytes = all.memory.device_bytes(),
                                  .host_bytes = all.memory.host_bytes(),
                                  .handles = 0,
                                  .launches = all.launches};
  const std::lock_guard lock(all.mutex);
  counts.calls = all.calls;
  counts.handles = all.handles.size() + all.memory.shared_count();
  return counts;
}
