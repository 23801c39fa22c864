#include "client/gpu_capture.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <utility>

#include "base/out_of_memory.h"
#include "base/text.h"
#include "client/quiet_thread.h"
#include "kernels/strided.h"

namespace stillframe::client {

namespace {

// Of the two halves 64 MiB a launch: some 50 us of packing, some ms of copying.
constexpr std::uint64_t kWindowBytes = std::uint64_t{128} << 20;
constexpr std::uint64_t kWindowBytesMin = 2 * kExtentBytes;

bool has_window(const GpuOptions& options) {
  return options.window_bytes == 0 || options.window_bytes >= kWindowBytesMin;
}

std::uint32_t chunk_extents(const GpuOptions& options) {
  std::uint64_t bytes =
      has_window(options) && options.window_bytes != 0 ? options.window_bytes : kWindowBytes;
  if (options.lane != GpuLane::kPinned && options.ring_bytes != 0) {
    bytes = std::clamp(options.ring_bytes, kWindowBytesMin, bytes);
  }
  return static_cast<std::uint32_t>(std::min(bytes, kWindowBytes) / 2 / kExtentBytes);
}

// Of each GPU: one is copied while the next is packed.
constexpr std::size_t kChunksInFlight = 2;
// A worker that copies nothing for that long does not go on.
constexpr std::chrono::seconds kWorkerPatience{5};
// A GPU first ends what the trainer has enqueued before, which may be a long step or two.
constexpr std::chrono::seconds kIdlePatience{60};
// How long a driver that answers with errors is asked again.
constexpr std::chrono::seconds kErrorPatience{1};
constexpr std::chrono::microseconds kPollPause{50};

}  // namespace

GpuCapture::GpuCapture(CaptureEngine& engine, const GpuOptions& options,
                       GpuRing::Opener open_worker)
    : engine_(engine),
      options_(options),
      open_worker_(std::move(open_worker)),
      chunk_extents_(chunk_extents(options)) {}

GpuCapture::~GpuCapture() {
  stop();
  {
    const std::lock_guard lock(mutex_);
    is_ending_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
  if (!is_lost_) return;
  // What a GPU may still use must stay: a leak is better than a crash of the training.
  for (auto& [ordinal, device] : devices_) (void)device.release();
  (void)new (std::nothrow) cuda::HostBuffer(std::move(staging_));
}

// --- Planning ------------------------------------------------------------------------------------

Status GpuCapture::plan(const std::shared_ptr<const Layout>& layout,
                        std::span<const sf_source> sources, bool is_lazy) {
  is_needed_ = std::ranges::any_of(
      sources, [](const sf_source& source) { return source.memory == SF_MEMORY_CUDA; });
  if (!is_needed_) return ok();
  {
    const std::lock_guard lock(mutex_);
    if (is_lost_) {
      return Error(
          Code::kUnavailable,
          "a GPU did not end what it was asked to do; its tensors are not captured in this "
          "process any more");
    }
  }
  if (!driver_) {
    auto driver = cuda::Driver::load();
    if (!driver) return std::move(driver).error();
    driver_ = *std::move(driver);
  }
  if (std::ranges::any_of(devices_,
                          [](const auto& entry) { return entry.second->wants_worker(); })) {
    is_planned_ = false;
  }
  auto changed = tensors_.update(driver_, layout, sources, is_lazy);
  if (!changed || *changed) is_planned_ = false;
  if (!changed) return std::move(changed).error();
  if (is_planned_) {
    is_needed_ = !tensors_.get().empty();
    return ok();
  }
  layout_ = layout;
  auto prepared = prepare(is_lazy);
  if (prepared) {
    is_planned_ = true;
  } else {
    end_work();
  }
  return prepared;
}

Status GpuCapture::prepare(bool is_lazy) {
  is_eager_ = false;
  is_needed_ = !tensors_.get().empty();
  if (!is_needed_) return ok();
  plan_ = make_gpu_plan(*layout_, tensors_.get(), chunk_extents_);
  auto prepared = prepare_devices();
  if (prepared || prepared.error().code() != Code::kResourceExhausted || !is_lazy) return prepared;
  // Without the early copies, then: the trainer waits instead.
  std::vector<GpuTensor> late(tensors_.get().begin(), tensors_.get().end());
  for (GpuTensor& tensor : late) tensor.is_early = false;
  is_eager_ = true;
  plan_ = make_gpu_plan(*layout_, late, chunk_extents_);
  return prepare_devices();
}

Status GpuCapture::prepare_devices() {
  steps_.clear();
  for (const GpuPlan::Share& share : plan_.shares) {
    if (devices_.contains(share.ordinal)) continue;
    auto opened = GpuDevice::open(driver_, share.ordinal);
    if (!opened) return std::move(opened).error();
    devices_.emplace(share.ordinal, *std::move(opened));
  }
  if (plan_.staging_bytes > staging_bytes_) {
    staging_ = {};
    staging_bytes_ = 0;
    auto staging = cuda::allocate_host(devices_.at(plan_.shares.front().ordinal)->context(),
                                       plan_.staging_bytes);
    if (!staging) return std::move(staging).error();
    staging_ = *std::move(staging);
    staging_bytes_ = plan_.staging_bytes;
  }
  std::size_t step_count = 0;
  for (const GpuPlan::Share& share : plan_.shares) {
    auto prepared = devices_.at(share.ordinal)
                        ->prepare(share, *layout_,
                                  {.staging = static_cast<std::byte*>(staging_.get()),
                                   .staging_bytes = plan_.staging_bytes,
                                   .has_window = has_window(options_),
                                   .lane = wanted_lane(),
                                   .open_worker = open_worker_,
                                   .ring_bytes = options_.ring_bytes});
    if (!prepared) return prepared;
    step_count += share.chunks.size();
  }
  // In turn, so that all GPUs are at work at once.
  steps_.reserve(step_count);
  for (std::size_t i = 0; steps_.size() < step_count; ++i) {
    for (const GpuPlan::Share& share : plan_.shares) {
      if (i >= share.chunks.size()) continue;
      steps_.push_back({.device = devices_.at(share.ordinal).get(),
                        .chunk = i,
                        .part = share.chunks[i].part,
                        .first_extent = share.chunks[i].first_extent});
    }
  }
  return ok();
}

// A ring that cannot hold two extents is none.
GpuLane GpuCapture::wanted_lane() const noexcept {
  const bool has_ring = options_.ring_bytes == 0 || options_.ring_bytes >= kWindowBytesMin;
  return has_ring ? options_.lane : GpuLane::kPinned;
}

bool GpuCapture::copies_to_slot() const noexcept {
  return std::ranges::any_of(plan_.shares, [this](const GpuPlan::Share& share) {
    // A GPU that could not be opened has none.
    const auto device = devices_.find(share.ordinal);
    return !share.chunks.empty() &&
           (device == devices_.end() || device->second->lane() == GpuLane::kPinned);
  });
}

void GpuCapture::drop_workers() noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (is_lost_) return;  // A GPU may still be at work with what is theirs.
  }
  for (auto& [ordinal, device] : devices_) {
    if (device->lane() != GpuLane::kPinned) is_planned_ = false;
    device->drop_worker();
  }
}

Result<cuda::HostRegistration> GpuCapture::register_slot(Bytes slot) {
  return cuda::register_host(devices_.at(plan_.shares.front().ordinal)->context(), slot);
}

std::string_view GpuCapture::lane() const noexcept {
  if (!is_needed_) return "host";
  return copies_to_slot() || wanted_lane() == GpuLane::kPinned ? "pinned"
         : wanted_lane() == GpuLane::kHbm                      ? "hbm"
                                                               : "ipc";
}

std::string GpuCapture::lane_reason() const {
  if (!is_needed_) return "all tensors are the host's";
  std::string reason = options_.lane == GpuLane::kPinned
                           ? "hbm and ipc are used where they are asked for"
                           : "it was asked for, where it is possible";
  if (options_.lane != wanted_lane()) reason += "; a ring of no bytes";
  for (const auto& [ordinal, device] : devices_) {
    if (!device->worker_reason().empty()) {
      reason += concat("; not on GPU ", ordinal, ": ", device->worker_reason());
    }
    if (!device->window_reason().empty()) {
      reason += concat("; without a window on GPU ", ordinal, ": ", device->window_reason());
    }
  }
  if (is_eager_) reason += "; eager, for a GPU has no memory left for copies of its buffers";
  return reason;
}

// --- A capture -----------------------------------------------------------------------------------

CUstream GpuCapture::stream_of(int ordinal) const {
  for (const sf_stream& stream : streams_) {
    if (stream.device == ordinal) return static_cast<CUstream>(stream.stream);
  }
  return nullptr;
}

Status GpuCapture::begin(const Job& job, CaptureSources& sources) {
  streams_.assign(job.streams.begin(), job.streams.end());
  auto brought = bring(job, sources);
  if (!brought) end_work();
  return brought;
}

Status GpuCapture::bring(const Job& job, CaptureSources& sources) {
  for (const GpuPlan::Share& share : plan_.shares) {
    GpuDevice& device = *devices_.at(share.ordinal);
    if (!share.chunks.empty() && device.writes_to_slot() && !job.is_slot_registered) {
      return Error(
          Code::kResourceExhausted,
          concat("GPU ", share.ordinal, " has no memory for a window (", device.window_reason(),
                 ") and the slot could not be page-locked for it to write to"));
    }
    auto followed = device.follow(stream_of(share.ordinal), job.is_lazy);
    if (!followed) return followed;
  }
  auto* const staging = static_cast<std::byte*>(staging_.get());
  for (const GpuPlan::Fetch& fetch : plan_.fetches) {
    auto fetched = devices_.at(fetch.ordinal)->fetch(fetch, staging);
    if (!fetched) return fetched;
  }
  if (!plan_.fetches.empty()) {
    auto waited = wait_idle();
    if (!waited) return waited;
  }
  for (const GpuPlan::Fetched& fetched : plan_.fetched) {
    sources.set_fetched(fetched.tensor, staging + fetched.staging_offset);
  }
  for (const GpuPlan::HostRun& run : plan_.host_runs) {
    const kernels::Source& source = sources.of_part(run.part)[run.source];
    const Bytes target(staging + run.staging_offset, run.bytes);
    if (source.strides == nullptr) {
      std::memcpy(target.data(), source.data + run.offset, run.bytes);
    } else {
      kernels::gather(*source.strides, source.data, run.offset, target);
    }
  }
  for (const GpuPlan::Share& share : plan_.shares) {
    auto brought = devices_.at(share.ordinal)->end_bringing();
    if (!brought) return brought;
  }
  return ok();
}

// All that was enqueued on any GPU has ended. An error: it may not have.
Status GpuCapture::wait_idle() {
  for (const auto& [ordinal, device] : devices_) {
    auto marked = device->mark_idle();
    if (!marked) return marked;
  }
  const auto begin = std::chrono::steady_clock::now();
  for (const auto& [ordinal, device] : devices_) {
    for (;;) {
      auto idle = device->is_idle();
      if (!idle) return std::move(idle).error();
      if (*idle) break;
      const auto waited = std::chrono::steady_clock::now() - begin;
      if (waited > kWorkerPatience) device->give_worker_up();
      if (waited > kIdlePatience) {
        return Error(Code::kUnavailable,
                     concat("GPU ", ordinal, " did not end its work within 60 s"));
      }
      std::this_thread::sleep_for(kPollPause);
    }
  }
  return ok();
}

// After a failure: nobody but the GPU knows what it still does, and until it says so it is at work.
void GpuCapture::end_work() noexcept {
  const auto begin = std::chrono::steady_clock::now();
  for (;;) {
    const auto idle = or_out_of_memory([this] { return wait_idle(); });
    if (idle) return;
    if (std::chrono::steady_clock::now() - begin > kErrorPatience) {
      const std::lock_guard lock(mutex_);
      is_lost_ = true;
      return;
    }
    std::this_thread::sleep_for(kPollPause);
  }
}

Status GpuCapture::start(const Job& job) {
  const std::lock_guard lock(mutex_);
  job_ = job;
  if (!thread_.joinable()) {
    auto thread = start_quiet_thread("sf-gpu", [this] { run_thread(); });
    if (!thread) return std::move(thread).error();
    thread_ = *std::move(thread);
  }
  has_job_ = true;
  wait_ = job.is_lazy ? GpuWait::kNothing : GpuWait::kAll;
  is_cancelled_ = false;
  is_enqueued_ = false;
  changed_.notify_all();
  return ok();
}

Result<bool> GpuCapture::fence(Deadline deadline) {
  {
    std::unique_lock lock(mutex_);
    wait_ = std::max(wait_, job_.compares_all ? GpuWait::kAll : GpuWait::kPacking);
    changed_.notify_all();
    const bool is_in_time = changed_.wait_until(
        lock, deadline.time(), [this] { return is_enqueued_ || !has_job_ || is_cancelled_; });
    if (!is_in_time) return false;
    // The engine has the reason.
    if (is_cancelled_) return true;
  }
  for (const GpuPlan::Share& share : plan_.shares) {
    if (share.chunks.empty()) continue;
    GpuDevice& device = *devices_.at(share.ordinal);
    auto held = device.hold(stream_of(share.ordinal));
    if (!held) return std::move(held).error();
    while (!*held && !device.is_packed()) {
      if (deadline.has_passed()) return false;
      std::this_thread::sleep_for(kPollPause);
    }
  }
  return true;
}

void GpuCapture::hurry() noexcept {
  const std::lock_guard lock(mutex_);
  wait_ = GpuWait::kAll;
  changed_.notify_all();
}

std::chrono::nanoseconds GpuCapture::held_for() const noexcept {
  std::chrono::nanoseconds longest{};
  for (const auto& [ordinal, device] : devices_) longest = std::max(longest, device->held_for());
  return longest;
}

void GpuCapture::stop() noexcept {
  std::unique_lock lock(mutex_);
  is_cancelled_ = true;
  changed_.notify_all();
  changed_.wait(lock, [this] { return !has_job_; });
}

// --- The thread ----------------------------------------------------------------------------------

void GpuCapture::run_thread() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return has_job_ || is_ending_; });
    if (!has_job_) return;
    lock.unlock();
    const auto ran = or_out_of_memory([this] { return run_steps(); });
    if (!ran) {
      engine_.abort(job_.ticket, ran.error());
      // Void first, then nothing waits for it.
      for (const auto& [ordinal, device] : devices_) device->release();
      end_work();
    }
    lock.lock();
    is_cancelled_ = is_cancelled_ || !ran;
    has_job_ = false;
    changed_.notify_all();
  }
}

// Until all is published, or the reason why not.
Status GpuCapture::run_steps() {
  const std::size_t in_flight_max = kChunksInFlight * devices_.size();
  std::size_t next = 0;
  for (std::size_t done = 0; done < steps_.size();) {
    GpuWait wait = GpuWait::kNothing;
    {
      const std::lock_guard lock(mutex_);
      if (is_cancelled_) return Error(Code::kCancelled, "the capture was given up");
      wait = wait_;
      if (next == steps_.size() && !is_enqueued_ && !job_.compares_all) {
        is_enqueued_ = true;
        changed_.notify_all();
      }
    }
    for (const auto& [ordinal, device] : devices_) {
      auto advanced = device->advance(job_.slot, wait);
      if (!advanced) return advanced;
      auto watched = device->watch_hold();
      if (!watched) return watched;
    }
    const GpuDevice* const device = next < steps_.size() ? steps_[next].device : nullptr;
    if (device != nullptr && device->can_enqueue(steps_[next].chunk) &&
        (wait != GpuWait::kNothing || next - done < in_flight_max ||
         device->is_enqueued_at_once())) {
      auto enqueued = steps_[next].device->enqueue(steps_[next].chunk, job_.slot);
      if (!enqueued) return enqueued;
      ++next;
      continue;
    }
    auto is_done = steps_[done].device->is_done(steps_[done].chunk);
    if (!is_done) return std::move(is_done).error();
    if (*is_done) {
      if (done + 1 == steps_.size()) {
        auto compared = compare();
        if (!compared) return compared;
      }
      auto published = publish(steps_[done]);
      if (!published) return published;
      ++done;
      continue;
    }
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kPollPause, [&] { return is_cancelled_ || wait_ != wait; });
  }
  return ok();
}

// Before the last of it is published, so that nothing torn is ever captured.
Status GpuCapture::compare() {
  for (const GpuPlan::Share& share : plan_.shares) {
    auto compared = devices_.at(share.ordinal)->compare(job_.slot.bytes, job_.compares_all);
    if (!compared) return compared;
  }
  return ok();
}

Status GpuCapture::publish(const Step& step) {
  std::uint32_t extent = step.first_extent;
  for (const std::uint64_t hash : step.device->hashes(step.chunk)) {
    auto published = engine_.publish(job_.ticket, step.part, extent++, hash);
    if (!published) return published;
  }
  return ok();
}

}  // namespace stillframe::client
