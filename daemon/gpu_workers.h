#pragma once

#include <sys/types.h>

#include <boost/asio/posix/stream_descriptor.hpp>
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/unique_fd.h"
#include "daemon/environment.h"
#include "daemon/rank_arena.h"
#include "daemon/task.h"
#include "shm/channel.h"

namespace stillframe::daemon {

// The processes that have GPUs' contexts (gpu_worker.h), one for each GPU that a client asked for:
// started when it is needed, ended when its last client has gone, replaced when it died. Asio
// thread.
class GpuWorkers {
 public:
  explicit GpuWorkers(Environment& environment)
      : environment_(environment), tasks_(environment.context) {}
  GpuWorkers(const GpuWorkers&) = delete;
  GpuWorkers& operator=(const GpuWorkers&) = delete;

  // A client's connection to the worker of a GPU, which gets the arena with it. kUnavailable: it
  // has no such GPU, did not come up, or died three times within a minute; the message says which.
  struct Opened {
    UniqueFd socket;
    pid_t pid = 0;
  };
  Task<Opened> open(std::string gpu_uuid, std::shared_ptr<RankArena> arena);

  // For status displays: the GPUs and their workers.
  std::map<std::string, pid_t> pids() const;

  // Ends all of them, and waits for that. Call before this goes.
  asio::awaitable<void> close();

 private:
  struct Worker {
    Worker(asio::io_context& context, std::string its_uuid, shm::Channel its_channel,
           pid_t its_pid);
    ~Worker();

    const std::string uuid;
    shm::Channel channel;
    const pid_t pid;
    asio::posix::stream_descriptor socket;  // The channel's descriptor, for waiting; not its owner.
    bool is_ready = false;
    bool is_ended = false;  // By us.
    std::optional<Error> failure;
    std::uint64_t served_count = 0;
    Signal changed;
  };

  Result<std::shared_ptr<Worker>> start(const std::string& uuid);
  asio::awaitable<void> watch(std::shared_ptr<Worker> worker);
  void take(const std::shared_ptr<Worker>& worker, const shm::wire::MessageT& message);
  asio::awaitable<void> end_if_unused(std::shared_ptr<Worker> worker, std::uint64_t served_count);
  asio::awaitable<void> reap(std::shared_ptr<Worker> worker);
  void end(Worker& worker);

  Environment& environment_;
  TaskScope tasks_;
  std::map<std::string, std::shared_ptr<Worker>> workers_;  // By UUID; none that has gone.
  std::map<std::string, std::deque<std::chrono::steady_clock::time_point>> deaths_;
  bool is_closing_ = false;
};

}  // namespace stillframe::daemon
