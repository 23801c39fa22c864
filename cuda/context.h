#pragma once

#include <memory>
#include <utility>

#include "base/result.h"
#include "cuda/driver.h"

namespace stillframe::cuda {

// The primary context of a GPU: the one that frameworks compute in. Retained while this lives, so
// that what was made in it can be ended. Any thread.
class Context {
 public:
  // `ordinal` as this process counts its GPUs. Makes the context where there is none yet, which
  // takes hundreds of MiB of the GPU: only where the trainer has one, or in a process for it.
  static Result<std::shared_ptr<const Context>> retain(std::shared_ptr<const Driver> driver,
                                                       int ordinal);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const Driver& driver() const noexcept { return *driver_; }
  const Calls& calls() const noexcept { return driver_->calls(); }
  CUcontext get() const noexcept { return context_; }
  int ordinal() const noexcept { return ordinal_; }
  CUdevice device() const noexcept { return device_; }

 private:
  Context(std::shared_ptr<const Driver> driver, int ordinal, CUdevice device, CUcontext context);

  std::shared_ptr<const Driver> driver_;
  int ordinal_;
  CUdevice device_;
  CUcontext context_;
};

// While it lives, a context is this thread's current one; afterwards the former is again. Where the
// driver refuses, the calls made meanwhile fail with its reason.
//
// The calls are also none of the business of a CUDA graph that another thread records: in the mode
// that threads have by default, as little as asking for an event would end that recording with an
// error there (pytorch/pytorch#105182).
class Current {
 public:
  explicit Current(const Context& context) noexcept
      : context_(context),
        is_pushed_(context.calls().cuCtxPushCurrent(context.get()) == CUDA_SUCCESS) {
    (void)context.calls().cuThreadExchangeStreamCaptureMode(&recording_);
  }
  ~Current() {
    (void)context_.calls().cuThreadExchangeStreamCaptureMode(&recording_);
    CUcontext popped = nullptr;
    if (is_pushed_) (void)context_.calls().cuCtxPopCurrent(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Context& context_;
  bool is_pushed_;
  CUstreamCaptureMode recording_ = CU_STREAM_CAPTURE_MODE_RELAXED;  // Afterwards the former.
};

// Sole owner of what the driver made in a context, ended by `kEnd` of Calls; an empty owner is a
// valid state. An error of the end is dropped: the context is broken then, or the process ends.
template <class Handle, auto kEnd>
class Owned {
 public:
  Owned() = default;
  Owned(std::shared_ptr<const Context> context, Handle handle) noexcept
      : context_(std::move(context)), handle_(handle) {}
  Owned(Owned&& other) noexcept
      : context_(std::move(other.context_)), handle_(std::exchange(other.handle_, Handle())) {}
  Owned& operator=(Owned&& other) noexcept {
    Owned taken(std::move(other));
    std::swap(context_, taken.context_);
    std::swap(handle_, taken.handle_);
    return *this;
  }
  ~Owned() {
    if (!context_) return;
    const Current current(*context_);
    (void)(context_->calls().*kEnd)(handle_);
  }

  Handle get() const noexcept { return handle_; }
  explicit operator bool() const noexcept { return context_ != nullptr; }

 private:
  std::shared_ptr<const Context> context_;
  Handle handle_ = {};
};

}  // namespace stillframe::cuda
