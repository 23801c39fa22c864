#include "client/quiet_thread.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <csignal>
#include <new>
#include <system_error>
#include <utility>

#include "base/out_of_memory.h"
#include "base/text.h"

namespace stillframe::client {

Result<std::thread> start_quiet_thread(const char* name, std::function<void()> body) {
  // A new thread inherits the mask of its maker.
  sigset_t all;
  sigset_t before;
  (void)::sigfillset(&all);
  (void)::pthread_sigmask(SIG_SETMASK, &all, &before);
  Result<std::thread> thread = std::thread();
  try {
    thread = std::thread([body = std::move(body)] {
      // Waking it must not take the CPU from a training thread: its share is the same, but it waits
      // for its turn. Where that is not allowed it is an ordinary thread.
      const sched_param none{};
      (void)::sched_setscheduler(0, SCHED_BATCH, &none);
      body();
    });
    (void)::pthread_setname_np(thread->native_handle(), name);
  } catch (const std::bad_alloc&) {
    thread = out_of_memory();
  } catch (const std::system_error& error) {
    thread = Error(Code::kResourceExhausted, concat("start thread ", name, ": ", error.what()),
                   error.code().value());
  }
  (void)::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

std::uint32_t usable_cpu_count() {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  std::uint32_t count = std::thread::hardware_concurrency();
  if (::sched_getaffinity(0, sizeof cpus, &cpus) == 0) {
    count = static_cast<std::uint32_t>(CPU_COUNT(&cpus));
  }
  return std::max<std::uint32_t>(count, 1);
}

}  // namespace stillframe::client
