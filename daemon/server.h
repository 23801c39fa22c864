#pragma once

#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/signal_set.hpp>
#include <chrono>
#include <list>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "base/result.h"
#include "base/unique_fd.h"
#include "daemon/environment.h"
#include "daemon/gpu_workers.h"
#include "daemon/run.h"
#include "daemon/session.h"
#include "daemon/task.h"

namespace stillframe::daemon {

struct ServerOptions {
  std::string socket_path;
  // Ends the daemon after that long without sessions, saves or slots that wait; 0: never.
  std::chrono::seconds idle_exit{0};
  bool is_private = false;
};

// Accepts clients and owns what they share: the open runs. Asio thread.
class Server final : public SessionHost {
 public:
  // `listener` is bound and listening.
  Server(Environment& environment, ServerOptions options, UniqueFd listener);

  // Serves until SIGTERM, SIGINT or idleness. Then no client is accepted, captures are voided, and
  // what was captured is still written; returns when all is down.
  asio::awaitable<void> run();

  Task<std::shared_ptr<Run>> open_run(std::string path, bool force_filesystem) override;
  Result<std::shared_ptr<Run>> find_run(const std::string& path) override;
  Task<GpuWorkers::Opened> open_gpu_worker(std::string gpu_uuid,
                                           std::shared_ptr<RankArena> arena) override;
  std::string status_json() override;

 private:
  // Together with the descriptors of a session (at most about 12) well below the usual limit of
  // 1024.
  static constexpr std::size_t kSessionCountMax = 64;

  asio::awaitable<void> accept_clients();
  asio::awaitable<void> serve(std::shared_ptr<Session> session);
  asio::awaitable<void> watch_signals();
  asio::awaitable<void> close_idle_runs();
  asio::awaitable<void> close_run(std::shared_ptr<Run> run);
  asio::awaitable<void> watch_idleness();
  void stop(const std::string& reason);

  Environment& environment_;
  ServerOptions options_;
  asio::posix::stream_descriptor listener_;
  asio::signal_set signals_;
  TaskScope tasks_;
  Signal changed_;
  bool is_stopping_ = false;
  GpuWorkers gpu_workers_;
  std::list<std::shared_ptr<Session>> sessions_;
  std::map<std::string, std::shared_ptr<Run>> runs_;
  std::set<std::string> busy_paths_;  // Runs being opened or closed.
  std::int64_t started_ns_ = 0;
};

}  // namespace stillframe::daemon
