#pragma once

#include <memory>

#include "base/result.h"
#include "cuda/resources.h"

namespace stillframe::client {

// A stream of ours on one GPU, and a way to see it through that never waits for ever. One thread.
class GpuQueue {
 public:
  static Result<GpuQueue> create(const std::shared_ptr<const cuda::Context>& context);

  const std::shared_ptr<const cuda::Context>& context() const noexcept { return context_; }
  CUstream stream() const noexcept { return stream_.get(); }
  // Until all that was enqueued has ended. kUnavailable: the GPU does not say so within 10 s, or
  // never will; what was enqueued may still use its memory.
  Status wait() const;
  // The same in two steps, for what was enqueued before the first of them.
  Status mark(const cuda::Event& event) const;
  Status wait_for(const cuda::Event& event) const;

 private:
  GpuQueue(std::shared_ptr<const cuda::Context> context, cuda::Stream stream, cuda::Event event);

  std::shared_ptr<const cuda::Context> context_;
  cuda::Stream stream_;
  cuda::Event event_;
};

}  // namespace stillframe::client
