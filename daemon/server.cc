#include "daemon/server.h"

#include <spdlog/spdlog.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <csignal>
#include <utility>
#include <vector>

#include "base/text.h"
#include "daemon/status.h"

namespace stillframe::daemon {

using asio::posix::stream_descriptor;

Server::Server(Environment& environment, ServerOptions options, UniqueFd listener)
    : environment_(environment),
      options_(std::move(options)),
      listener_(environment.context, listener.release()),
      signals_(environment.context, SIGTERM, SIGINT),
      tasks_(environment.context),
      changed_(environment.context),
      gpu_workers_(environment),
      started_ns_(environment.clock.monotonic_ns()) {}

asio::awaitable<void> Server::run() {
  tasks_.spawn(accept_clients());
  tasks_.spawn(watch_signals());
  tasks_.spawn(close_idle_runs());
  if (options_.idle_exit.count() > 0) tasks_.spawn(watch_idleness());
  co_await tasks_.join();
  co_await gpu_workers_.close();

  for (auto& entry : runs_) {
    const std::shared_ptr<Run> run = entry.second;
    co_await run->close();
  }
  runs_.clear();
}

void Server::stop(const std::string& reason) {
  if (is_stopping_) return;
  is_stopping_ = true;
  environment_.log.info("stopping: {}", reason);
  boost::system::error_code ignored;
  listener_.close(ignored);
  signals_.cancel(ignored);
  // A copy: ending a session may take it from the list.
  const std::vector<std::shared_ptr<Session>> sessions(sessions_.begin(), sessions_.end());
  for (const auto& session : sessions) session->stop("the daemon stops");
  changed_.notify();
}

asio::awaitable<void> Server::watch_signals() {
  const auto result = co_await signals_.async_wait(asio::as_tuple(asio::use_awaitable));
  if (!std::get<0>(result)) stop(concat("signal ", std::get<1>(result)));
}

asio::awaitable<void> Server::accept_clients() {
  while (!is_stopping_) {
    const auto waited = co_await listener_.async_wait(stream_descriptor::wait_read,
                                                      asio::as_tuple(asio::use_awaitable));
    if (std::get<0>(waited)) co_return;
    UniqueFd socket(
        ::accept4(listener_.native_handle(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!socket) {
      if (errno == EMFILE || errno == ENFILE) {
        // The one waiting would wake us again at once; others must close first.
        environment_.log.error("out of descriptors; not accepting for a second");
        co_await changed_.wait(std::chrono::steady_clock::now() + std::chrono::seconds(1));
      }
      continue;
    }
    shm::Channel channel(std::move(socket));
    auto peer = channel.peer();
    // Same user or root: the socket's directory says so too, where there is one of our own.
    if (!peer || (peer->uid != ::geteuid() && peer->uid != 0)) {
      environment_.log.warn("refused a client of another user");
      continue;
    }
    if (sessions_.size() >= kSessionCountMax) {
      environment_.log.warn("refused a client: {} are connected", sessions_.size());
      continue;
    }
    auto session = std::make_shared<Session>(environment_, *this, std::move(channel), *peer);
    sessions_.push_back(session);
    tasks_.spawn(serve(std::move(session)));
  }
}

asio::awaitable<void> Server::serve(std::shared_ptr<Session> session) {
  changed_.notify();
  co_await session->run();
  sessions_.remove(session);
  changed_.notify();
}

Task<std::shared_ptr<Run>> Server::open_run(std::string path, bool force_filesystem) {
  for (;;) {
    while (busy_paths_.contains(path)) co_await changed_.wait();
    if (is_stopping_) co_return Error(Code::kUnavailable, "the daemon stops; try again");
    // Those that were removed or renamed after their trainer's death; under a new name, too, their
    // locks would be in the way.
    std::shared_ptr<Run> moved;
    for (const auto& [its_path, run] : runs_) {
      if (!run->has_trainer() && run.use_count() == 1 && !run->is_in_place()) moved = run;
    }
    if (moved) {
      environment_.log.info("run={} is not there any more", moved->path());
      co_await close_run(std::move(moved));
      continue;
    }
    if (const auto found = runs_.find(path); found != runs_.end()) co_return found->second;
    break;
  }

  busy_paths_.insert(path);
  auto run = co_await Run::open(environment_, path, force_filesystem);
  busy_paths_.erase(path);
  if (run) {
    (*run)->set_on_idle([this] { changed_.notify(); });
    runs_.emplace(path, *run);
  }
  changed_.notify();
  co_return run;
}

Result<std::shared_ptr<Run>> Server::find_run(const std::string& path) {
  const auto found = runs_.find(path);
  if (found == runs_.end()) {
    return Error(Code::kNotFound, concat("this daemon does not hold the run ", path));
  }
  return found->second;
}

Task<GpuWorkers::Opened> Server::open_gpu_worker(std::string gpu_uuid,
                                                 std::shared_ptr<RankArena> arena) {
  auto opened = co_await gpu_workers_.open(std::move(gpu_uuid), std::move(arena));
  co_return opened;
}

asio::awaitable<void> Server::close_idle_runs() {
  while (!is_stopping_) {
    std::shared_ptr<Run> idle;
    for (const auto& [path, run] : runs_) {
      // A use count above one: somebody is about to enter it.
      if (run->is_idle() && run.use_count() == 1) idle = run;
    }
    if (!idle) {
      co_await changed_.wait();
      continue;
    }
    co_await close_run(std::move(idle));
  }
}

asio::awaitable<void> Server::close_run(std::shared_ptr<Run> run) {
  const std::string path = run->path();
  busy_paths_.insert(path);
  runs_.erase(path);
  co_await run->close();
  run.reset();  // The run's lock is free from here on.
  busy_paths_.erase(path);
  changed_.notify();
}

asio::awaitable<void> Server::watch_idleness() {
  const auto is_idle = [this] { return sessions_.empty() && runs_.empty() && busy_paths_.empty(); };
  while (!is_stopping_) {
    if (!is_idle()) {
      co_await changed_.wait();
      continue;
    }
    const auto deadline = std::chrono::steady_clock::now() + options_.idle_exit;
    while (is_idle() && !is_stopping_ && std::chrono::steady_clock::now() < deadline) {
      co_await changed_.wait(deadline);
    }
    if (is_idle()) stop("idle");
  }
}

std::string Server::status_json() {
  DaemonStatus status{.environment = environment_,
                      .socket_path = options_.socket_path,
                      .is_private = options_.is_private,
                      .started_ns = started_ns_,
                      .gpu_workers = gpu_workers_.pids(),
                      .sessions = {},
                      .runs = {}};
  for (const auto& session : sessions_) status.sessions.push_back(session.get());
  for (const auto& [path, run] : runs_) status.runs.push_back(run.get());
  return to_json(status);
}

}  // namespace stillframe::daemon
