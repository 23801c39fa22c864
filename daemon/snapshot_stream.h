#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <vector>

#include "base/result.h"
#include "daemon/snapshot_plan.h"
#include "shm/ring.h"

namespace stillframe::daemon {

// The extents of one snapshot on their way from the client's ring to the writer. The Asio thread
// puts them in, checked against the plan; the I/O thread takes them out and writes while the
// capture still runs.
class SnapshotStream {
 public:
  struct Extent {
    std::uint32_t part = 0;
    std::uint32_t extent = 0;
    std::uint64_t hash = 0;
  };
  enum class End : std::uint8_t { kOpen, kComplete, kVoided };
  struct Taken {
    std::vector<Extent> extents;
    End end = End::kOpen;
  };

  // `wake` ends the writer's wait; any thread may call it.
  SnapshotStream(const SnapshotPlan& plan, std::function<void()> wake);

  // Asio thread. kInvalidArgument: no such part or extent, or it came twice: the client lies.
  Status accept(const shm::ExtentRecord& record);
  // Asio thread. kInvalidArgument: extents are missing.
  Status complete();
  // Asio thread. After it, nothing changes. The first end stands.
  void void_capture(Error reason);

  // I/O thread.
  Taken take();
  // Why it was voided; kCancelled while it was not.
  Error void_reason() const;

 private:
  const SnapshotPlan& plan_;
  std::function<void()> wake_;
  std::vector<std::vector<bool>> seen_;  // Asio thread only.
  std::uint64_t seen_count_ = 0;         // Asio thread only.

  mutable std::mutex mutex_;
  std::vector<Extent> waiting_;
  End end_ = End::kOpen;
  std::optional<Error> reason_;
};

}  // namespace stillframe::daemon
