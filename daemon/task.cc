#include "daemon/task.h"

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <tuple>

namespace stillframe::daemon {

asio::awaitable<void> Signal::wait(std::chrono::steady_clock::time_point deadline) {
  asio::steady_timer timer(context_, deadline);
  const auto place = waiters_.insert(waiters_.end(), &timer);
  // The error is always operation_aborted or none: both mean "look again".
  std::ignore = co_await timer.async_wait(asio::as_tuple(asio::use_awaitable));
  waiters_.erase(place);
}

asio::awaitable<void> TaskScope::join() {
  while (running_count_ > 0) co_await changed_.wait();
}

}  // namespace stillframe::daemon
