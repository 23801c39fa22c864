#include "daemon/io_thread.h"

#include <pthread.h>

#include <future>
#include <utility>

#include "base/text.h"

namespace stillframe::daemon {

Result<std::unique_ptr<IoThread>> IoThread::start(asio::io_context& context,
                                                  const BackendFactory& factory) {
  std::unique_ptr<IoThread> io(new IoThread(context));
  std::promise<Status> made;
  auto ready = made.get_future();
  io->thread_ = std::thread([&made, &factory, thread = io.get()] {
    (void)::pthread_setname_np(::pthread_self(), "sf-io");
    auto created = factory();
    if (!created) {
      made.set_value(std::move(created).error());
      return;
    }
    thread->backend_ = std::move(created->backend);
    thread->fallback_reason_ = std::move(created->fallback_reason);
    made.set_value(ok());
    thread->loop();
    // The ring belongs to this thread, its end included.
    thread->backend_.reset();
  });
  auto status = ready.get();
  if (!status) return std::move(status).error();
  return io;
}

IoThread::~IoThread() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  posted_.notify_one();
  if (thread_.joinable()) thread_.join();
}

Status IoThread::post(Job job) {
  {
    const std::lock_guard lock(mutex_);
    if (jobs_.size() >= kJobCountMax) {
      return Error(Code::kResourceExhausted,
                   concat("run: ", jobs_.size(), " jobs already wait for the drive; try again"));
    }
    jobs_.push_back(std::move(job));
  }
  posted_.notify_one();
  return ok();
}

void IoThread::loop() {
  for (;;) {
    Job job;
    {
      std::unique_lock lock(mutex_);
      posted_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job(*backend_);
  }
}

}  // namespace stillframe::daemon
