#include "client/quiet_thread.h"

#include <pthread.h>

#include <csignal>
#include <system_error>
#include <utility>

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
    thread = std::thread(std::move(body));
    (void)::pthread_setname_np(thread->native_handle(), name);
  } catch (const std::system_error& error) {
    thread = Error(Code::kResourceExhausted, concat("start thread ", name, ": ", error.what()),
                   error.code().value());
  }
  (void)::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

}  // namespace stillframe::client
