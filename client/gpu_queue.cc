#include "client/gpu_queue.h"

#include <chrono>
#include <thread>
#include <utility>

#include "base/text.h"

namespace stillframe::client {

namespace {

constexpr std::chrono::seconds kPatience{10};
constexpr std::chrono::microseconds kPollPause{20};

}  // namespace

GpuQueue::GpuQueue(std::shared_ptr<const cuda::Context> context, cuda::Stream stream,
                   cuda::Event event)
    : context_(std::move(context)), stream_(std::move(stream)), event_(std::move(event)) {}

Result<GpuQueue> GpuQueue::create(const std::shared_ptr<const cuda::Context>& context) {
  auto stream = cuda::create_stream(context);
  if (!stream) return std::move(stream).error();
  auto event = cuda::create_event(context);
  if (!event) return std::move(event).error();
  return GpuQueue(context, *std::move(stream), *std::move(event));
}

Status GpuQueue::wait() const {
  const cuda::Current current(*context_);
  const cuda::Calls& calls = context_->calls();
  const auto begin = std::chrono::steady_clock::now();
  CUresult result = calls.cuEventRecord(event_.get(), stream_.get());
  while (result == CUDA_SUCCESS || result == CUDA_ERROR_NOT_READY) {
    result = calls.cuEventQuery(event_.get());
    if (result == CUDA_SUCCESS) return ok();
    if (std::chrono::steady_clock::now() - begin > kPatience) {
      return Error(Code::kUnavailable,
                   concat("GPU ", context_->ordinal(), " did not end its copies within 10 s"));
    }
    std::this_thread::sleep_for(kPollPause);
  }
  return context_->driver().check("wait for a GPU", result);
}

}  // namespace stillframe::client
