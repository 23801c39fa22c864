#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "base/result.h"
#include "catalog/run.h"
#include "catalog/run_lock.h"
#include "cli/tool.h"
#include "shm/messages.h"

namespace stillframe::cli {

// The run as it stands. kNotFound: there is none at that path.
Result<catalog::RunContents> open_run(Tool& tool, const std::string& run_path);

// A checkpoint together with the run that it stands in.
struct Chosen {
  catalog::RunContents run;
  catalog::Checkpoint checkpoint;
};
Result<Chosen> open_checkpoint(Tool& tool, const std::string& address);

// Takes the run's lock, and waits two seconds for it: a daemon lets go of a run only a moment after
// its trainer has closed it. `nonce` names this process in the lock. kUnavailable: another process
// writes the run.
Result<catalog::RunLock> lock_run(Tool& tool, const std::string& run_path, std::uint64_t nonce);

// Changes a run under its lock: by `here` when nobody else writes it, else by asking the daemon
// that holds the lock. kUnavailable: another process holds it that no daemon of ours knows.
Status change_run(Tool& tool, const std::string& run_path,
                  const std::function<Status(uring::IoBackend&)>& here,
                  shm::wire::MessageT at_the_daemon);

// Sets, moves or removes one tag. A sequence of 0 removes the tag.
Status put_tag(Tool& tool, const std::string& run_path, const std::string& tag,
               std::uint64_t sequence);

}  // namespace stillframe::cli
