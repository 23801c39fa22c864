#include "daemon/gpu_worker.h"

#include <poll.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <ctime>
#include <list>
#include <memory>
#include <utility>
#include <vector>

#include "base/text.h"
#include "cuda/devices.h"
#include "cuda/shared_buffer.h"
#include "daemon/gpu_worker_client.h"

namespace stillframe::daemon {

namespace wire = shm::wire;

namespace {

// Copies on a GPU tell nobody that they have ended; while there are some, they are asked.
constexpr long kPollPauseNs = 50'000;

// Clients, and what they want copied. One thread: nothing in here waits for a GPU.
class GpuWorker {
 public:
  GpuWorker(std::shared_ptr<const cuda::Context> context, shm::Channel daemon, double drain_share)
      : context_(std::move(context)), daemon_(std::move(daemon)), drain_share_(drain_share) {}

  // Until the daemon has gone.
  Status serve();
  shm::Channel& daemon() noexcept { return daemon_; }

 private:
  struct Served {
    std::unique_ptr<GpuWorkerClient> client;
    bool is_gone = false;
  };
  // Is told why when it asks for something.
  struct Refused {
    shm::Channel channel;
    Error error;
  };

  void wait();
  Result<bool> read_daemon();
  Status add_client(const wire::ServeClientT& request, std::vector<UniqueFd> fds);
  Status serve_clients();
  void answer_refused();

  std::shared_ptr<const cuda::Context> context_;
  shm::Channel daemon_;
  double drain_share_;
  std::list<Served> clients_;
  std::list<Refused> refused_;
  std::uint64_t served_count_ = 0;
};

Status GpuWorker::serve() {
  for (;;) {
    wait();
    auto goes_on = read_daemon();
    if (!goes_on) return std::move(goes_on).error();
    if (!*goes_on) break;
    auto served = serve_clients();
    if (!served) return served;
  }
  // Nothing more is begun; what is under way touches memory that must stay until it has ended.
  for (Served& served : clients_) served.is_gone = true;
  while (!clients_.empty()) {
    auto ended = serve_clients();
    if (!ended) return ended;
    const timespec pause = {.tv_sec = 0, .tv_nsec = kPollPauseNs};
    (void)::nanosleep(&pause, nullptr);
  }
  return ok();
}

void GpuWorker::wait() {
  std::vector<pollfd> sockets = {{.fd = daemon_.fd(), .events = POLLIN, .revents = 0}};
  bool is_busy = false;
  for (const Served& served : clients_) {
    is_busy = is_busy || served.client->is_busy();
    if (!served.is_gone) {
      sockets.push_back({.fd = served.client->fd(), .events = POLLIN, .revents = 0});
    }
  }
  for (const Refused& refused : refused_) {
    sockets.push_back({.fd = refused.channel.fd(), .events = POLLIN, .revents = 0});
  }
  const timespec pause = {.tv_sec = 0, .tv_nsec = kPollPauseNs};
  (void)::ppoll(sockets.data(), sockets.size(), is_busy ? &pause : nullptr, nullptr);
}

// False: the daemon has gone.
Result<bool> GpuWorker::read_daemon() {
  for (;;) {
    auto received = daemon_.receive();
    if (!received) return false;
    if (!*received) return true;
    const wire::ServeClientT* const request = (*received)->message.body.AsServeClient();
    if (request == nullptr) return false;
    auto added = add_client(*request, std::move((*received)->fds));
    if (!added) return std::move(added).error();
  }
}

Status GpuWorker::add_client(const wire::ServeClientT& request, std::vector<UniqueFd> fds) {
  ++served_count_;
  // Its connection ends with this, which tells the client enough.
  if (fds.size() != 2 || request.slot_bytes == 0 || request.arena_bytes % request.slot_bytes != 0) {
    return ok();
  }
  auto arena = shm::Arena::adopt(std::move(fds[1]), request.arena_bytes);
  if (!arena) return ok();
  shm::Channel channel(std::move(fds[0]));
  auto drain = GpuDrain::open(context_, *std::move(arena), request.slot_bytes, drain_share_);
  if (!drain) {
    // A GPU that works but has nothing to spare for one more is no reason to leave the others.
    const auto works = cuda::memory_left(*context_);
    if (!works) return works.error();
    refused_.push_back({.channel = std::move(channel), .error = drain.error()});
    return ok();
  }
  clients_.push_back(
      {.client = std::make_unique<GpuWorkerClient>(context_, std::move(channel), *std::move(drain)),
       .is_gone = false});
  return ok();
}

void GpuWorker::answer_refused() {
  for (auto refused = refused_.begin(); refused != refused_.end();) {
    const auto received = refused->channel.receive();
    if (received && !*received) {
      ++refused;
      continue;
    }
    if (received) {
      (void)refused->channel.send(
          shm::make_message((*received)->message.request, shm::to_wire(refused->error)));
    }
    refused = refused_.erase(refused);
  }
}

Status GpuWorker::serve_clients() {
  const bool had_clients = !clients_.empty() || !refused_.empty();
  answer_refused();
  for (auto served = clients_.begin(); served != clients_.end();) {
    GpuWorkerClient& client = *served->client;
    if (!served->is_gone) {
      auto read = client.read();
      if (!read) return std::move(read).error();
      served->is_gone = !*read;
    }
    if (served->is_gone) client.give_up();
    auto alive = client.advance();
    if (!alive) return std::move(alive).error();
    served->is_gone = served->is_gone || !*alive;
    served = served->is_gone && !client.is_at_work() ? clients_.erase(served) : std::next(served);
  }
  if (had_clients && clients_.empty() && refused_.empty()) {
    wire::GpuWorkerIdleT idle;
    idle.served_count = served_count_;
    (void)daemon_.send(shm::make_message(0, std::move(idle)));
  }
  return ok();
}

Result<std::shared_ptr<const cuda::Context>> take_gpu(const std::string& uuid) {
  auto driver = cuda::Driver::load();
  if (!driver) return std::move(driver).error();
  auto devices = cuda::list_devices(**driver);
  if (!devices) return std::move(devices).error();
  const auto found = std::ranges::find(*devices, uuid, &cuda::DeviceFacts::uuid);
  if (found == devices->end()) {
    return Error(Code::kNotFound, concat("the daemon sees no GPU ", uuid));
  }
  return cuda::Context::retain(*driver, static_cast<int>(found - devices->begin()));
}

}  // namespace

Status run_gpu_worker(GpuWorkerOptions options, spdlog::logger& log) {
  shm::Channel daemon(std::move(options.daemon_socket));
  auto context = take_gpu(options.gpu_uuid);
  wire::GpuWorkerReadyT ready;
  if (!context) ready.failure = std::make_unique<wire::FailureT>(shm::to_wire(context.error()));
  (void)daemon.send(shm::make_message(0, std::move(ready)));
  if (!context) return ok();  // The daemon has the reason, and tells who asked.
  log.info("GPU worker of {} serves", options.gpu_uuid);
  auto worker =
      std::make_unique<GpuWorker>(*std::move(context), std::move(daemon), options.drain_share);
  auto served = worker->serve();
  // After an error nobody knows what the GPU still does with our memory: that ends with the
  // process, which is about to.
  if (!served) (void)worker.release();
  return served;
}

}  // namespace stillframe::daemon
