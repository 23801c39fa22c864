#pragma once

#include <boost/asio/io_context.hpp>
#include <chrono>
#include <cstdint>

#include "base/clock.h"
#include "base/rng.h"
#include "daemon/hash_pool.h"
#include "daemon/io_thread.h"

namespace spdlog {
class logger;
}

namespace stillframe::daemon {

// What every part of the daemon is given. Owned by main(), outlives them all.
struct Environment {
  asio::io_context& context;
  const Clock& clock;
  Rng& rng;
  HashPool& hash_pool;
  spdlog::logger& log;
  BackendFactory backend_factory;
  std::uint64_t instance_nonce = 0;
  std::uint64_t arena_bytes_max = 0;  // 0: half of what memory leaves.
  double gpu_drain_share = 0.5;       // GpuWorkerOptions::drain_share.
  // How long a dead trainer's slots wait for its restart.
  std::chrono::seconds keep_slots{600};
};

}  // namespace stillframe::daemon
