#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "base/result.h"
#include "cuda/shared_buffer.h"
#include "daemon/gpu_drain.h"
#include "daemon/gpu_packer.h"
#include "shm/channel.h"

namespace stillframe::daemon {

// One client of a GPU worker. Either it packs by itself into a ring of the GPU's memory, which is
// copied to its slot from there (lane hbm), or it lends its memory, which is packed here as well
// (lane ipc).
//
// Trusted with nothing: it may have each byte of its ring, or of what it lends, copied to each byte
// of a slot of its own arena, which it can write to anyway. One thread; nothing here waits.
class GpuWorkerClient {
 public:
  GpuWorkerClient(std::shared_ptr<const cuda::Context> context, shm::Channel channel,
                  std::unique_ptr<GpuDrain> drain)
      : context_(std::move(context)), channel_(std::move(channel)), drain_(std::move(drain)) {}

  int fd() const noexcept { return channel_.fd(); }
  // Takes in what it says. False: it has gone, or must go. The Error: the GPU's, with which no more
  // can be done.
  Result<bool> read();
  // Copies on and answers. As read().
  Result<bool> advance();
  // Whether the GPU is at work for it: then this object must stay.
  bool is_at_work() const noexcept;
  // Whether advance() has something to do.
  bool is_busy() const noexcept;
  // Nothing more is begun for it.
  void give_up() noexcept;

 private:
  Result<bool> handle(shm::Packet packet);
  Result<bool> refuse(std::uint64_t id, const Error& error);
  Result<bool> make_ring(std::uint64_t id, const shm::wire::MakeGpuRingT& request);
  bool drain(std::uint64_t id, const shm::wire::DrainGpuRingT& request);
  Result<bool> set_plan(std::uint64_t id, const shm::wire::PlanGpuT& request,
                        std::vector<UniqueFd> fds);
  Result<std::unique_ptr<GpuPacker>> open_packer(const shm::wire::PlanGpuT& request,
                                                 const std::vector<UniqueFd>& fds);
  bool lease(const shm::wire::LeaseGpuT& request, const std::vector<UniqueFd>& fds);
  Status lease_all(const shm::wire::LeaseGpuT& request, const std::vector<UniqueFd>& fds);
  Result<bool> capture(std::uint64_t id, const shm::wire::CaptureGpuT& request);
  void hurry(const shm::wire::HurryGpuT& request);
  bool answer(std::uint64_t id, Status status);
  bool send(const shm::wire::MessageT& message, std::span<const int> fds = {});

  std::shared_ptr<const cuda::Context> context_;
  shm::Channel channel_;
  cuda::SharedBuffer ring_;
  std::unique_ptr<GpuPacker> packer_;
  std::optional<Error> lease_error_;  // Told when the capture is asked for.
  std::uint64_t capture_id_ = 0;
  GpuPacker::Wait wait_ = GpuPacker::Wait::kNothing;  // Of the capture.
  std::unique_ptr<GpuDrain> drain_;                   // After what it reads, so that it ends first.
};

}  // namespace stillframe::daemon
