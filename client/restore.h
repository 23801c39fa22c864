#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/mapping.h"
#include "base/result.h"
#include "catalog/block_reader.h"
#include "client/gpu_restore.h"
#include "client/io_owner.h"
#include "client/libstillframe.h"
#include "client/restore_plan.h"
#include "client/session.h"

namespace stillframe::client {

// One committed checkpoint, its files open until the end, so that what retention removes meanwhile
// can still be read. All I/O is done by a thread of its own. Any thread may call it, one read at a
// time.
class CheckpointReader {
 public:
  // `session` may be null; else, while it lives, reads first ask its daemon for the snapshot in
  // memory, and belong to the session's thread.
  static Result<std::unique_ptr<CheckpointReader>> open(const std::string& run_path,
                                                        const std::string& selector,
                                                        const std::shared_ptr<Session>& session);
  // A safetensors file that stands alone: one part, no state. Extents of a stranger's file, which
  // has no hashes, are not checked.
  static Result<std::unique_ptr<CheckpointReader>> open_file(const std::string& path);
  ~CheckpointReader();
  CheckpointReader(const CheckpointReader&) = delete;
  CheckpointReader& operator=(const CheckpointReader&) = delete;

  struct Stats {
    bool is_from_memory = false;
    std::uint64_t bytes = 0;
  };
  // Contract: sf_checkpoint_read().
  Result<Stats> read(std::span<const sf_target> targets);

  // Reads every extent of every part from the drive. kDataLoss names the first that differs from
  // its hash; kInvalidArgument: there are none.
  Status verify();
  // Contract: sf_checkpoint_check(). Any thread, beside everything else.
  Status check(std::uint64_t part, std::uint64_t offset, ConstBytes bytes) const;

  const std::string& manifest_text() const noexcept { return manifest_text_; }
  const std::string& state() const noexcept { return state_; }
  // nullptr beyond the last part.
  const std::string* header(std::uint64_t part) const noexcept {
    return part < headers_.size() ? &headers_[part] : nullptr;
  }
  pid_t owner_pid() const noexcept { return owner_pid_; }

 private:
  CheckpointReader(std::unique_ptr<IoOwner> io, std::weak_ptr<Session> session);

  // Opens on the thread that reads, and keeps what came of it.
  Status take(const std::function<Result<catalog::OpenCheckpoint>(uring::IoBackend&)>& open);
  // `gpus` may be null: the plan has no targets there.
  Result<bool> read_from_memory(const RestorePlan& plan, const GpuTargets* gpus);
  bool is_layout_of(const Session& session) const;
  Status read_from_disk(const RestorePlan& plan, const GpuTargets* gpus);
  Status make_staging(const RestorePlan& plan);
  kernels::CopyKernel kernel() const;

  const pid_t owner_pid_;
  std::mutex mutex_;
  std::unique_ptr<IoOwner> io_;
  std::weak_ptr<Session> session_;
  std::optional<catalog::OpenCheckpoint> checkpoint_;  // Made and ended on the thread of io_.
  std::optional<TensorIndex> index_;
  Mapping staging_;
  std::string manifest_text_;
  std::string state_;
  std::vector<std::string> headers_;
};

}  // namespace stillframe::client
