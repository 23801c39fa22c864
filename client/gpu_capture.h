#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"
#include "client/capture.h"
#include "client/capture_sources.h"
#include "client/deadline.h"
#include "client/gpu_device.h"
#include "client/gpu_plan.h"
#include "client/gpu_tensors.h"
#include "client/libstillframe.h"

namespace stillframe::client {

struct GpuOptions {
  std::uint64_t window_bytes = 0;  // Of each GPU, as sf_attach_options has it; and below.
  std::uint64_t ring_bytes = 0;
  GpuLane lane = GpuLane::kPinned;  // Where it is possible.
};

// The lanes `pinned`, `hbm` and `ipc`: what of a capture lies on GPUs, packed there by kernels and
// brought to the slot by their copy engines, both enqueued here or by the GPU's worker. A thread of
// its own enqueues the chunks, a few at a time so that the trainer's own copies find their turn
// between them, and publishes those that are done through the CaptureEngine, which has the rest. No
// CUDA call is made before the first tensor of a GPU.
//
// Session thread.
class GpuCapture {
 public:
  // `open_worker` is called by plan() alone.
  GpuCapture(CaptureEngine& engine, const GpuOptions& options, GpuRing::Opener open_worker);
  ~GpuCapture();
  GpuCapture(const GpuCapture&) = delete;
  GpuCapture& operator=(const GpuCapture&) = delete;

  // Before a slot is taken: finds the GPUs' tensors among the sources and plans for them.
  // kUnavailable: no driver or no kernels; kInvalidArgument: as GpuTensors; kResourceExhausted: no
  // page-locked memory, or none of the GPU for a few MiB of descriptors.
  Status plan(const std::shared_ptr<const Layout>& layout, std::span<const sf_source> sources,
              bool is_lazy);
  // Whether the save that was planned has tensors on GPUs; all below is for those that have.
  bool is_needed() const noexcept { return is_needed_; }
  // Whether the trainer may go on only when all is captured: a GPU had no memory for the copies
  // that would have let it.
  bool is_eager() const noexcept { return is_eager_; }
  const std::vector<std::vector<bool>>& is_packed() const noexcept { return plan_.is_packed; }
  // The arena is another one, or the daemon: what workers know of them is of no use.
  void drop_workers() noexcept;
  // Whether this process copies to the slot; workers page-lock it for themselves.
  bool copies_to_slot() const noexcept;
  // Page-locks a slot for every GPU, if it can; without it only the copies are slower.
  Result<cuda::HostRegistration> register_slot(Bytes slot);

  struct Job {
    GpuDevice::Slot slot;
    bool is_slot_registered = false;
    std::uint64_t ticket = 0;
    bool is_lazy = false;
    bool compares_all = false;  // Of a lazy one, all of the GPUs' lazy tensors; then fence() waits.
    std::span<const sf_stream> streams;
  };
  // First: everything that has to be read before the trainer goes on, and the place in the
  // trainer's streams. Waits for what is fetched.
  Status begin(const Job& job, CaptureSources& sources);
  // Then, when the engine has begun: chunk after chunk. Until stop(), or the engine has all.
  Status start(const Job& job);
  // Makes the trainer's streams wait until the GPUs' tensors have been packed, and lets the rest be
  // enqueued at once for that; where all is compared, waits for that instead. False: `deadline`
  // passed first.
  Result<bool> fence(Deadline deadline);
  // The trainer waits for all of the capture that runs, if one does. Any thread.
  void hurry() noexcept;
  // How long the trainer's streams have waited at the fence, the longest of them. Once the engine
  // has all of the capture.
  std::chrono::nanoseconds held_for() const noexcept;
  // Afterwards no GPU touches slot and sources. Where one does not end its work within 60 s,
  // nothing of a GPU is captured any more, and what it may still use is never freed.
  void stop() noexcept;

  // "host", "pinned", "hbm" or "ipc", that of the GPUs or the least of them, and why not another.
  std::string_view lane() const noexcept;
  std::string lane_reason() const;

 private:
  struct Step {
    GpuDevice* device = nullptr;
    std::size_t chunk = 0;  // Of that device.
    std::uint32_t part = 0;
    std::uint32_t first_extent = 0;
  };

  Status prepare(bool is_lazy);
  Status prepare_devices();
  GpuLane wanted_lane() const noexcept;
  Status bring(const Job& job, CaptureSources& sources);
  CUstream stream_of(int ordinal) const;
  Status wait_idle();
  void end_work() noexcept;
  void run_thread();
  Status run_steps();
  Status publish(const Step& step);
  Status compare();

  CaptureEngine& engine_;
  const GpuOptions options_;
  const GpuRing::Opener open_worker_;
  const std::uint32_t chunk_extents_;
  // Session thread, and the thread of this while a job runs.
  std::shared_ptr<const cuda::Driver> driver_;
  std::shared_ptr<const Layout> layout_;
  GpuTensors tensors_;
  bool is_planned_ = false;
  bool is_needed_ = false;
  bool is_eager_ = false;
  GpuPlan plan_;
  cuda::HostBuffer staging_;
  std::uint64_t staging_bytes_ = 0;
  std::map<int, std::unique_ptr<GpuDevice>> devices_;
  std::vector<Step> steps_;  // Of all GPUs, in turn.
  std::vector<sf_stream> streams_;
  Job job_;

  // Under the mutex.
  std::mutex mutex_;
  std::condition_variable changed_;
  bool has_job_ = false;  // Until all of it has ended.
  GpuWait wait_ = GpuWait::kNothing;
  bool is_cancelled_ = false;
  bool is_enqueued_ = false;
  bool is_ending_ = false;
  bool is_lost_ = false;  // What a GPU may still be at work with is never freed.
  std::thread thread_;
};

}  // namespace stillframe::client
