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
  auto marked = mark(event_);
  return marked ? wait_for(event_) : marked;
}

Status GpuQueue::mark(const cuda::Event& event) const {
  const cuda::Current current(*context_);
  return context_->driver().check("mark a stream",
                                  context_->calls().cuEventRecord(event.get(), stream_.get()));
}

Status GpuQueue::wait_for(const cuda::Event& event) const {
  const auto begin = std::chrono::steady_clock::now();
  for (;;) {
    auto happened = cuda::has_happened(*context_, event);
    if (!happened) return std::move(happened).error();
    if (*happened) return ok();
    if (std::chrono::steady_clock::now() - begin > kPatience) {
      return Error(Code::kUnavailable,
                   concat("GPU ", context_->ordinal(), " did not end its copies within 10 s"));
    }
    std::this_thread::sleep_for(kPollPause);
  }
}

}  // namespace stillframe::client
