#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "tests/simulated_cuda/control.h"

namespace stillframe::testing {

// The simulated driver's controls, found in the very library that the code under test loads.
class SimulatedCuda {
 public:
  SimulatedCuda() : library_(::dlopen("libcuda.so.1", RTLD_NOW | RTLD_NODELETE)) {
    find(fail_, "simulated_cuda_fail");
    find(heal_, "simulated_cuda_heal");
    find(limit_, "simulated_cuda_limit");
    find(count_, "simulated_cuda_count");
  }

  void fail(const char* call, std::uint64_t nth, int result, bool is_sticky = false) const {
    fail_(call, nth, result, is_sticky ? 1 : 0);
  }
  void heal() const { heal_(); }
  void limit(std::uint64_t device_bytes) const { limit_(device_bytes); }
  simulated_cuda_counts count() const {
    simulated_cuda_counts counts = {};
    count_(&counts);
    return counts;
  }

 private:
  template <class Function>
  void find(Function*& function, const char* name) {
    function = library_ == nullptr ? nullptr : reinterpret_cast<Function*>(::dlsym(library_, name));
    if (function != nullptr) return;
    std::fprintf(stderr, "libcuda.so.1 is not the simulated one: no %s\n", name);
    std::abort();
  }

  void* library_;
  decltype(&simulated_cuda_fail) fail_ = nullptr;
  decltype(&simulated_cuda_heal) heal_ = nullptr;
  decltype(&simulated_cuda_limit) limit_ = nullptr;
  decltype(&simulated_cuda_count) count_ = nullptr;
};

}  // namespace stillframe::testing
