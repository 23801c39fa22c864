#pragma once

#include <boost/asio/posix/stream_descriptor.hpp>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "daemon/environment.h"
#include "daemon/gpu_workers.h"
#include "daemon/run.h"
#include "daemon/snapshot_plan.h"
#include "daemon/task.h"
#include "shm/channel.h"
#include "shm/ring.h"

namespace stillframe::daemon {

// What a session asks of the daemon as a whole. Implemented by Server.
class SessionHost {
 public:
  virtual ~SessionHost() = default;
  // Opens the run or finds it open.
  virtual Task<std::shared_ptr<Run>> open_run(std::string path, bool force_filesystem) = 0;
  // kNotFound: this daemon does not hold it.
  virtual Result<std::shared_ptr<Run>> find_run(const std::string& path) = 0;
  // Contract: GpuWorkers::open().
  virtual Task<GpuWorkers::Opened> open_gpu_worker(std::string gpu_uuid,
                                                   std::shared_ptr<RankArena> arena) = 0;
  virtual std::string status_json() = 0;
};

// One connection: a trainer's, or a tool's. Three coroutines: messages in, messages out, and the
// peer's death; a trainer has a fourth, its ring, and each change of a run that it asks for is one
// more. They end together, and run() returns when all have.
//
// The peer is trusted with nothing: every number it sends is checked against the daemon's own copy
// of its layout, and the first malformed frame or record ends the connection.
class Session : public std::enable_shared_from_this<Session> {
 public:
  Session(Environment& environment, SessionHost& host, shm::Channel channel,
          shm::PeerCredentials peer);

  asio::awaitable<void> run();
  // Ends it from outside: the daemon stops.
  void stop(const std::string& reason);

  std::int64_t peer_pid() const noexcept { return peer_.pid; }
  const std::string& role() const noexcept { return role_; }
  const std::string& run_path() const noexcept { return run_path_; }

 private:
  // Messages that the peer has not read yet. It reads when it asks, and each save makes two.
  static constexpr std::size_t kOutgoingCountMax = 1024;

  // Times the server's connections, this leaves room for saves among the jobs of an I/O thread.
  static constexpr std::size_t kChangeCountMax = 3;

  struct Outgoing {
    shm::wire::MessageT message;
    std::vector<UniqueFd> fds;
  };

  asio::awaitable<void> read_messages();
  asio::awaitable<void> write_messages();
  asio::awaitable<void> expect_hello();
  asio::awaitable<void> watch_peer();
  asio::awaitable<void> watch_ring(std::shared_ptr<asio::posix::stream_descriptor> event);

  // Answers one request; an Error becomes a Failure message. What only a broken peer sends ends the
  // session.
  asio::awaitable<void> handle(shm::Packet packet);
  Task<shm::wire::MessageT> attach(const shm::wire::AttachT& request);
  Task<Outgoing> register_layout(const shm::wire::RegisterLayoutT& request,
                                 std::vector<UniqueFd> fds);
  Task<shm::wire::MessageT> begin_save(const shm::wire::BeginSaveT& request,
                                       std::vector<UniqueFd> fds);
  Status end_capture(const shm::wire::EndCaptureT& request);
  Task<shm::wire::MessageT> settle(const shm::wire::SettleT& request);
  Task<Outgoing> open_gpu_worker(const shm::wire::OpenGpuWorkerT& request);
  Result<shm::wire::MessageT> lend_slot(const shm::wire::LendSlotT& request);
  // Beside the reading: the run's I/O thread may be in a save that ends only when this connection's
  // capture does.
  void start_change(std::uint64_t id, std::string run_path, std::optional<std::string> tag,
                    std::uint64_t sequence);
  asio::awaitable<void> change_run_and_answer(std::uint64_t id, std::string run_path,
                                              std::optional<std::string> tag,
                                              std::uint64_t sequence);
  Task<shm::wire::MessageT> change_run(std::string run_path, std::optional<std::string> tag,
                                       std::uint64_t sequence);
  Result<std::string> state_of(const shm::wire::BeginSaveT& request, std::vector<UniqueFd> fds);
  Status drain_ring();
  void offer_slot();
  void tell_ready(std::uint64_t layout_id, std::size_t slot);
  void tell_ended(const ActiveSave& save, const std::optional<Error>& failure,
                  std::int64_t ended_ns);

  void answer_to(std::uint64_t id, Result<shm::wire::MessageT> answer);
  void queue(shm::wire::MessageT message, std::vector<UniqueFd> fds = {});
  void leave_run(bool clean, const std::string& reason);

  Environment& environment_;
  SessionHost& host_;
  shm::Channel channel_;
  shm::PeerCredentials peer_;
  asio::posix::stream_descriptor socket_;  // The channel's descriptor, for waiting; not its owner.
  std::optional<asio::posix::stream_descriptor> pidfd_;
  TaskScope tasks_;
  Signal outgoing_changed_;
  Signal greeted_;
  std::deque<Outgoing> outgoing_;
  bool is_ending_ = false;
  bool is_peer_dead_ = false;
  bool is_handling_ = false;
  std::size_t change_count_ = 0;

  std::string role_;
  std::string run_path_;
  std::shared_ptr<Run> run_;
  std::shared_ptr<const SnapshotPlan> plan_;
  std::optional<shm::RingConsumer> ring_;
  std::shared_ptr<asio::posix::stream_descriptor> ring_event_;
  std::shared_ptr<ActiveSave> capturing_;
  // Of the ticket on offer: the ring may be seen before the message that takes the offer.
  std::vector<shm::ExtentRecord> early_records_;
};

}  // namespace stillframe::daemon
