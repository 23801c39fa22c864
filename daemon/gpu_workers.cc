#include "daemon/gpu_workers.h"

#include <fcntl.h>
#include <spdlog/spdlog.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <csignal>
#include <utility>

#include "base/os_error.h"
#include "base/text.h"
#include "daemon/launch.h"

namespace stillframe::daemon {

namespace wire = shm::wire;
using asio::posix::stream_descriptor;

namespace {

// The first use of a GPU after a boot may take seconds.
constexpr std::chrono::seconds kStartTimeout{20};
constexpr std::chrono::seconds kEndTimeout{5};
constexpr std::chrono::seconds kIdleGrace{2};
constexpr std::size_t kDeathsMax = 3;
constexpr std::chrono::seconds kDeathsWindow{60};
constexpr std::size_t kWorkersMax = 32;

// "GPU-01234567-...": becomes a word of a command line and an environment.
bool is_gpu_uuid(const std::string& text) {
  return text.starts_with("GPU-") && text.size() <= 64 &&
         std::ranges::all_of(text.substr(4), [](unsigned char c) {
           return c == '-' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

Result<std::pair<UniqueFd, UniqueFd>> make_pair_of_sockets() {
  std::array<int, 2> ends{};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()) != 0) {
    return os_error("connect a client to a GPU worker", errno);
  }
  return std::pair(UniqueFd(ends[0]), UniqueFd(ends[1]));
}

}  // namespace

GpuWorkers::Worker::Worker(asio::io_context& context, std::string its_uuid,
                           shm::Channel its_channel, pid_t its_pid)
    : uuid(std::move(its_uuid)),
      channel(std::move(its_channel)),
      pid(its_pid),
      socket(context, channel.fd()),
      changed(context) {}

GpuWorkers::Worker::~Worker() {
  (void)socket.release();  // The channel closes it.
}

Result<std::shared_ptr<GpuWorkers::Worker>> GpuWorkers::start(const std::string& uuid) {
  if (!is_gpu_uuid(uuid)) return Error(Code::kInvalidArgument, "that is no GPU's UUID");
  if (workers_.size() >= kWorkersMax) {
    return Error(Code::kUnavailable, concat(workers_.size(), " GPU workers run already"));
  }
  if (const auto known = deaths_.find(uuid); known != deaths_.end()) {
    auto& deaths = known->second;
    const auto now = std::chrono::steady_clock::now();
    while (!deaths.empty() && now - deaths.front() > kDeathsWindow) deaths.pop_front();
    if (deaths.size() >= kDeathsMax) {
      return Error(Code::kUnavailable, concat("the worker of ", uuid, " died ", deaths.size(),
                                              " times within a minute; see the daemon's log"));
    }
  }
  auto ends = make_pair_of_sockets();
  if (!ends) return std::move(ends).error();
  const auto level = spdlog::level::to_string_view(environment_.log.level());
  auto pid =
      launch_gpu_worker(uuid, ends->second.get(),
                        {concat("--gpu-drain-share=", environment_.gpu_drain_share),
                         concat("--log-level=", std::string_view(level.data(), level.size()))});
  if (!pid) return std::move(pid).error();
  auto worker = std::make_shared<Worker>(environment_.context, uuid,
                                         shm::Channel(std::move(ends->first)), *pid);
  workers_[uuid] = worker;
  tasks_.spawn(watch(worker));
  return worker;
}

Task<GpuWorkers::Opened> GpuWorkers::open(std::string gpu_uuid, std::shared_ptr<RankArena> arena) {
  if (is_closing_) co_return Error(Code::kUnavailable, "the daemon stops");
  std::shared_ptr<Worker> worker;
  if (const auto found = workers_.find(gpu_uuid); found != workers_.end()) {
    worker = found->second;
  } else {
    auto started = start(gpu_uuid);
    if (!started) co_return std::move(started).error();
    worker = *std::move(started);
  }
  const auto deadline = std::chrono::steady_clock::now() + kStartTimeout;
  while (!worker->is_ready && !worker->failure && std::chrono::steady_clock::now() < deadline) {
    co_await worker->changed.wait(deadline);
  }
  if (worker->failure) co_return *worker->failure;
  if (!worker->is_ready) {
    end(*worker);
    co_return Error(Code::kUnavailable, concat("the worker of ", gpu_uuid, " did not come up"));
  }
  auto ends = make_pair_of_sockets();
  if (!ends) co_return std::move(ends).error();
  wire::ServeClientT message;
  message.slot_bytes = arena->slot_bytes();
  message.arena_bytes = arena->slot_bytes() * arena->slots().size();
  const std::array<int, 2> fds = {ends->second.get(), arena->memory_fd()};
  auto sent = worker->channel.send(shm::make_message(0, std::move(message)), fds);
  if (!sent) co_return std::move(sent).error();
  if (!*sent) co_return Error(Code::kUnavailable, "the GPU worker does not read");
  ++worker->served_count;
  Opened opened;
  opened.socket = std::move(ends->first);
  opened.pid = worker->pid;
  co_return opened;
}

asio::awaitable<void> GpuWorkers::watch(std::shared_ptr<Worker> worker) {
  for (;;) {
    auto received = worker->channel.receive();
    if (!received) break;
    if (*received) {
      take(worker, (*received)->message);
      continue;
    }
    const auto waited = co_await worker->socket.async_wait(stream_descriptor::wait_read,
                                                           asio::as_tuple(asio::use_awaitable));
    if (std::get<0>(waited)) break;
  }
  if (!worker->failure) {
    worker->failure.emplace(Code::kUnavailable, concat("the worker of ", worker->uuid, " died"));
  }
  const auto found = workers_.find(worker->uuid);
  if (found != workers_.end() && found->second == worker) workers_.erase(found);
  if (!worker->is_ended) deaths_[worker->uuid].push_back(std::chrono::steady_clock::now());
  worker->changed.notify();
  co_await reap(worker);
}

void GpuWorkers::take(const std::shared_ptr<Worker>& worker, const wire::MessageT& message) {
  if (const auto* const ready = message.body.AsGpuWorkerReady(); ready != nullptr) {
    if (ready->failure) {
      worker->failure = shm::from_wire(*ready->failure);
      worker->is_ended = true;  // No death: it will be no better at once, and no worse.
    }
    worker->is_ready = !ready->failure;
    worker->changed.notify();
  }
  if (const auto* const idle = message.body.AsGpuWorkerIdle(); idle != nullptr) {
    tasks_.spawn(end_if_unused(worker, idle->served_count));
  }
}

// A client that plans anew comes back at once.
asio::awaitable<void> GpuWorkers::end_if_unused(std::shared_ptr<Worker> worker,
                                                std::uint64_t served_count) {
  const auto deadline = std::chrono::steady_clock::now() + kIdleGrace;
  while (!worker->is_ended && !worker->failure && worker->served_count == served_count) {
    if (std::chrono::steady_clock::now() >= deadline) {
      end(*worker);
      co_return;
    }
    co_await worker->changed.wait(deadline);
  }
}

// Its end of the connection is what it lives by.
void GpuWorkers::end(Worker& worker) {
  worker.is_ended = true;
  worker.changed.notify();
  (void)::shutdown(worker.channel.fd(), SHUT_RDWR);
  const auto found = workers_.find(worker.uuid);
  if (found != workers_.end() && found->second.get() == &worker) workers_.erase(found);
}

asio::awaitable<void> GpuWorkers::reap(std::shared_ptr<Worker> worker) {
  (void)::shutdown(worker->channel.fd(), SHUT_RDWR);
  // Killed only when it does not end by itself: its clients may be at work with what it shares
  // (GPU-21).
  const auto deadline = std::chrono::steady_clock::now() + kEndTimeout;
  int status = 0;
  for (bool is_killed = false;;) {
    if (::waitpid(worker->pid, &status, WNOHANG) == worker->pid) break;
    if (!is_killed && std::chrono::steady_clock::now() >= deadline) {
      is_killed = true;
      (void)::kill(worker->pid, SIGKILL);
    }
    asio::steady_timer pause(environment_.context, std::chrono::milliseconds(20));
    (void)co_await pause.async_wait(asio::as_tuple(asio::use_awaitable));
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
    environment_.log.info("GPU worker of {} ended", worker->uuid);
  } else {
    environment_.log.warn("GPU worker of {} died: {} {}", worker->uuid,
                          WIFSIGNALED(status) ? "signal" : "exit status",
                          WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
  }
}

std::map<std::string, pid_t> GpuWorkers::pids() const {
  std::map<std::string, pid_t> pids;
  for (const auto& [uuid, worker] : workers_) pids[uuid] = worker->pid;
  return pids;
}

asio::awaitable<void> GpuWorkers::close() {
  is_closing_ = true;
  const auto workers = workers_;
  for (const auto& [uuid, worker] : workers) end(*worker);
  co_await tasks_.join();
}

}  // namespace stillframe::daemon
