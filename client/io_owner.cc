#include "client/io_owner.h"

#include <utility>

#include "base/out_of_memory.h"
#include "client/quiet_thread.h"

namespace stillframe::client {

Result<std::unique_ptr<IoOwner>> IoOwner::start() {
  std::unique_ptr<IoOwner> owner(new IoOwner());
  auto thread = start_quiet_thread("sf-read", [self = owner.get()] { self->work(); });
  if (!thread) return std::move(thread).error();
  owner->thread_ = *std::move(thread);
  std::unique_lock lock(owner->mutex_);
  owner->changed_.wait(lock, [&owner] { return owner->is_ready_ || owner->start_error_; });
  if (owner->start_error_) {
    Error error = *owner->start_error_;
    lock.unlock();
    return error;
  }
  lock.unlock();
  return owner;
}

IoOwner::~IoOwner() {
  {
    const std::lock_guard lock(mutex_);
    is_ending_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void IoOwner::post(Job job) {
  {
    const std::lock_guard lock(mutex_);
    job_ = std::move(job);
  }
  changed_.notify_all();
}

Status IoOwner::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !job_; });
  return ended_;
}

void IoOwner::work() {
  auto created = or_out_of_memory([] { return uring::create_backend({}); });
  std::unique_lock lock(mutex_);
  if (!created) {
    start_error_ = std::move(created).error();
    changed_.notify_all();
    return;
  }
  is_ready_ = true;
  changed_.notify_all();
  for (;;) {
    changed_.wait(lock, [this] { return is_ending_ || job_; });
    if (!job_) return;
    lock.unlock();
    auto ended = or_out_of_memory([&] {
      job_(*created->backend);
      return ok();
    });
    lock.lock();
    ended_ = std::move(ended);
    job_ = nullptr;
    changed_.notify_all();
  }
}

}  // namespace stillframe::client
