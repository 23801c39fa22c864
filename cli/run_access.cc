#include "cli/run_access.h"

#include <chrono>
#include <filesystem>
#include <system_error>
#include <thread>
#include <utility>

#include "base/text.h"
#include "catalog/change.h"
#include "cli/address.h"
#include "cli/daemon_call.h"

namespace stillframe::cli {

namespace {

constexpr int kChangeTimeoutMs = 30'000;
constexpr std::int64_t kLockPatienceNs = 2'000'000'000;
constexpr std::chrono::milliseconds kLockPause(20);

}  // namespace

Result<catalog::RunContents> open_run(Tool& tool, const std::string& run_path) {
  auto io = tool.io();
  if (!io) return std::move(io).error();
  auto contents = catalog::read_run(**io, run_path);
  if (!contents) return std::move(contents).error();
  if (contents->run_id.empty() && contents->checkpoints.empty() && contents->damaged.empty()) {
    return Error(Code::kNotFound, concat(run_path,
                                         " is not a run; give the directory that the "
                                         "Checkpointer was given"));
  }
  return contents;
}

Result<Chosen> open_checkpoint(Tool& tool, const std::string& text) {
  auto address = read_address(text);
  if (!address) return std::move(address).error();
  auto run = open_run(tool, address->run_path);
  if (!run) return std::move(run).error();
  auto found = catalog::select(*run, address->selector);
  if (!found) {
    return Error(found.error().code(),
                 concat(found.error().message(), "; see: stillframe ls ", address->run_path));
  }
  catalog::Checkpoint checkpoint = **found;
  return Chosen{.run = *std::move(run), .checkpoint = std::move(checkpoint)};
}

Result<catalog::RunLock> lock_run(Tool& tool, const std::string& run_path, std::uint64_t nonce) {
  const std::int64_t deadline_ns = tool.clock().monotonic_ns() + kLockPatienceNs;
  for (;;) {
    auto lock = catalog::RunLock::acquire(run_path, nonce);
    const bool is_held = !lock && lock.error().code() == Code::kUnavailable;
    if (!is_held || tool.clock().monotonic_ns() >= deadline_ns) return lock;
    std::this_thread::sleep_for(kLockPause);
  }
}

Status change_run(Tool& tool, const std::string& run_path,
                  const std::function<Status(uring::IoBackend&)>& here,
                  shm::wire::MessageT at_the_daemon) {
  auto io = tool.io();
  if (!io) return std::move(io).error();
  const std::uint64_t nonce = tool.rng().next();
  auto lock = catalog::RunLock::acquire(run_path, nonce);
  if (!lock && lock.error().code() == Code::kUnavailable) {
    auto answer = call_daemon(tool, std::move(at_the_daemon), kChangeTimeoutMs);
    if (answer) return ok();
    if (answer.error().code() != Code::kNotFound) return std::move(answer).error();
    // Not our daemon's run, or no longer: it may have let go of it between the two questions.
    lock = lock_run(tool, run_path, nonce);
    if (!lock) {
      return Error(lock.error().code(), concat(lock.error().message(),
                                               "; asked its daemon: ", answer.error().message()));
    }
  }
  if (!lock) return std::move(lock).error();
  auto changed = here(**io);
  if (!changed) return changed;
  if (auto contents = catalog::read_run(**io, run_path)) catalog::refresh_links(**io, *contents);
  return ok();
}

Status put_tag(Tool& tool, const std::string& run_path, const std::string& tag,
               std::uint64_t sequence) {
  std::error_code failed;
  shm::wire::SetTagT request;
  request.run_path = std::filesystem::canonical(run_path, failed).string();
  request.tag = tag;
  request.sequence = sequence;
  if (failed) return Error(Code::kNotFound, concat(run_path, ": ", failed.message()));
  const auto here = [&](uring::IoBackend& io) {
    return sequence == 0 ? catalog::remove_tag(io, run_path, tag)
                         : catalog::set_tag(io, run_path, tag, sequence);
  };
  return change_run(tool, run_path, here, shm::make_message(0, std::move(request)));
}

}  // namespace stillframe::cli
