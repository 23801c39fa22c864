// A capture, from the slot that it got to its end: begun, waited for, published or given up.
#include <memory>
#include <mutex>
#include <utility>

#include "base/step.h"
#include "base/text.h"
#include "client/session.h"
#include "client/session_errors.h"

namespace stillframe::client {

namespace wire = shm::wire;

// Fills our page table for a slot at its first use: the copy would otherwise meet each page by a
// fault, and one without memory behind it would end the trainer.
Status Session::populate(std::uint32_t slot) {
  if (slots_[slot].is_populated) return ok();
  auto populated = arena_->populate(slot * slot_bytes_, slot_bytes_);
  if (populated) slots_[slot].is_populated = true;
  return populated;
}

// At its first use with GPUs. One that cannot be is only slower.
void Session::register_slot(std::uint32_t slot) {
  Slot& taken = slots_[slot];
  if (taken.is_registration_tried) return;
  taken.is_registration_tried = true;
  auto registered = gpus_.register_slot(slot_bytes_of(slot));
  if (registered) taken.registration = *std::move(registered);
}

// What has to be read before the trainer goes on is read here; the rest is begun.
Status Session::begin_engines(const SaveRequest& request, std::span<const sf_source> tensors,
                              std::uint64_t ticket) {
  const Bytes slot = slot_bytes_of(capturing_->slot);
  const bool is_lazy = request.capture == SF_CAPTURE_LAZY;
  const GpuCapture::Job on_gpus{
      .slot = {.bytes = slot, .arena_offset = capturing_->slot * slot_bytes_},
      .is_slot_registered = static_cast<bool>(slots_[capturing_->slot].registration),
      .ticket = ticket,
      .is_lazy = is_lazy,
      .compares_all = is_lazy && request.check == TornCheck::Extent::kFull,
      .streams = request.streams};
  if (gpus_.is_needed()) {
    auto begun = gpus_.begin(on_gpus, *sources_);
    if (!begun) return begun;
  }
  if (is_lazy) sources_->copy_eager(tensors, slot);
  engine_.begin(
      {.sources = sources_.get(),
       .slot = slot,
       .kernel = kernel_,
       .ticket = ticket,
       .daemon_ticket = capturing_->daemon_ticket,
       .is_packed = gpus_.is_needed() ? &gpus_.is_packed() : nullptr,
       .is_told_at_end = !is_lazy && !gpus_.is_needed() && are_most_cpus(engine_.copier_count())});
  // A save that the daemon gave up before the capture even began.
  if (const auto known = tickets_.find(ticket); known && known->failure) {
    engine_.abort(ticket, *known->failure);
  }
  return gpus_.is_needed() ? gpus_.start(on_gpus) : ok();
}

// Afterwards nothing of ours touches the sources and the slot.
void Session::stop_engines(const Error& reason) noexcept {
  engine_.stop(reason);
  gpus_.stop();
}

// Until every extent is in the slot; the calling thread copies too.
Status Session::copy_all(std::uint64_t ticket) {
  constexpr std::uint64_t kPatienceMs = 10'000;
  // A GPU first ends what the trainer has enqueued before.
  constexpr std::uint64_t kGpuPatienceMs = 60'000;
  const std::uint64_t patience_ms = gpus_.is_needed() ? kGpuPatienceMs : kPatienceMs;
  for (;;) {
    auto progress = engine_.step(ticket, true, Deadline::after_ms(patience_ms).time());
    if (!progress) return std::move(progress).error();
    if (*progress == CaptureEngine::Progress::kDone) return ok();
    if (*progress == CaptureEngine::Progress::kMoved) continue;
    return gpus_.is_needed() ? Error(Code::kUnavailable, "no GPU captured anything for 60 s")
                             : Error(Code::kInternal, "a copier did not finish its extent");
  }
}

// Tells the daemon and the ticket how the capture ended. Afterwards nothing touches the sources.
Status Session::end_capture(std::optional<Error> failure) {
  const Capturing capturing = *std::exchange(capturing_, std::nullopt);
  if (failure) stop_engines(*failure);
  const auto current = connection();
  STEP("client end capture");
  wire::EndCaptureT message;
  message.ticket = capturing.daemon_ticket;
  message.complete = !failure.has_value();
  if (failure) message.reason = failure->message();
  auto sent = current->send(shm::make_message(0, std::move(message)), {},
                            Deadline::after_ms(kSendTimeoutMs));
  if (!sent) {
    // A daemon that does not know how it ended must not keep the slot.
    current->drop(sent.error());
    if (!failure) failure = sent.error();
  }
  if (failure) {
    tickets_.set_failed(capturing.ticket, *failure);
    current->wake();
    return *failure;
  }
  if (gpus_.is_needed()) tickets_.add_fence_wait_ns(capturing.ticket, gpus_.held_for().count());
  tickets_.set_captured(capturing.ticket, clock_.monotonic_ns());
  current->wake();
  return ok();
}

Result<Waited> Session::wait_capture(std::uint64_t ticket, std::uint32_t timeout_ms, bool helps) {
  const std::int64_t begin_ns = clock_.monotonic_ns();
  const auto known = tickets_.find(ticket);
  if (!known) {
    return Error(Code::kInvalidArgument, concat("ticket ", ticket, " is not known"));
  }
  if (known->state == SaveState::kCaptured || known->state == SaveState::kDurable) {
    return Waited::kReached;
  }
  const auto note_time = [&] {
    if (helps) tickets_.add_fence_wait_ns(ticket, clock_.monotonic_ns() - begin_ns);
  };
  if (helps) gpus_.hurry();
  for (;;) {
    if (const auto current = connection()) current->take_in();
    if (const auto now = tickets_.find(ticket); now && now->failure) {
      note_time();
      return *now->failure;
    }
    auto progress = engine_.step(ticket, helps, Deadline::after_ms(timeout_ms).time());
    if (progress && *progress == CaptureEngine::Progress::kMoved) continue;
    note_time();
    if (!progress) return std::move(progress).error();
    if (*progress == CaptureEngine::Progress::kStuck) return Waited::kTimedOut;
    // kDone; or kOther: published by the session's thread meanwhile, and the next save begun.
    return Waited::kReached;
  }
}

Result<Waited> Session::open_fence(std::uint64_t ticket, std::uint32_t timeout_ms) {
  const std::int64_t begin_ns = clock_.monotonic_ns();
  const auto known = tickets_.find(ticket);
  if (!known) {
    return Error(Code::kInvalidArgument, concat("ticket ", ticket, " is not known"));
  }
  if (!capturing_ || capturing_->ticket != ticket) {
    if (known->failure) return *known->failure;
    return Waited::kReached;
  }
  const auto note_time = [&] {
    tickets_.add_fence_wait_ns(ticket, clock_.monotonic_ns() - begin_ns);
  };
  // The streams first: that is done at once, and what the host copies may take a while.
  if (gpus_.is_needed()) {
    auto held = gpus_.fence(Deadline::after_ms(timeout_ms));
    if (!held) {
      (void)end_capture(held.error());
      return std::move(held).error();
    }
    if (!*held) {
      note_time();
      return Waited::kTimedOut;
    }
  }
  for (;;) {
    auto progress = engine_.step(ticket, true, Deadline::after_ms(timeout_ms).time(),
                                 CaptureEngine::Scope::kHost);
    if (progress && *progress == CaptureEngine::Progress::kMoved) continue;
    note_time();
    if (!progress) return std::move(progress).error();
    if (*progress == CaptureEngine::Progress::kStuck) return Waited::kTimedOut;
    break;
  }
  auto compared = compare(known->step);
  if (!compared) return end_capture(compared.error()).error();
  capturing_->is_compared = true;
  return Waited::kReached;
}

// Whether the host's lazy tensors are still what was copied.
Status Session::compare(std::int64_t step) {
  const auto torn =
      torn_check_.find_torn(*sources_, slot_bytes_of(capturing_->slot), capturing_->check,
                            gpus_.is_needed() ? &gpus_.is_packed() : nullptr);
  if (!torn) return ok();
  return Error(Code::kDataLoss,
               concat("tensor ", *torn, " changed while it was captured; the save of step ", step,
                      " has failed"));
}

Status Session::publish(std::uint64_t ticket) {
  const auto known = tickets_.find(ticket);
  if (!known) {
    return Error(Code::kInvalidArgument, concat("ticket ", ticket, " is not known"));
  }
  if (!capturing_ || capturing_->ticket != ticket) {
    if (known->failure) return *known->failure;
    return ok();
  }
  if (const auto current = connection()) current->take_in();
  if (const auto now = tickets_.find(ticket); now && now->failure) {
    return end_capture(*now->failure);
  }
  auto progress = engine_.step(ticket, false, std::chrono::steady_clock::now());
  if (!progress) return end_capture(progress.error());
  if (*progress != CaptureEngine::Progress::kDone) {
    return Error(Code::kInvalidArgument,
                 concat("ticket ", ticket, " is still being copied; wait for the capture first"));
  }
  if (!capturing_->is_compared) {
    auto compared = compare(known->step);
    if (!compared) return end_capture(compared.error());
  }
  return end_capture(std::nullopt);
}

Status Session::void_capture(std::uint64_t ticket, const Error& reason) {
  if (!tickets_.find(ticket)) {
    return Error(Code::kInvalidArgument, concat("ticket ", ticket, " is not known"));
  }
  // Ended already, by itself or by the daemon's death.
  if (!capturing_ || capturing_->ticket != ticket) return ok();
  (void)end_capture(reason);
  return ok();
}

}  // namespace stillframe::client
