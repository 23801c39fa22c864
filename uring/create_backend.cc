#include <utility>

#include "uring/io_backend.h"
#include "uring/threads_backend.h"
#include "uring/uring_backend.h"

namespace stillframe::uring {

namespace {

Result<CreatedBackend> create_threads(std::string fallback_reason) {
  auto threads = ThreadsBackend::create();
  if (!threads) return std::move(threads).error();
  return CreatedBackend{.backend = *std::move(threads),
                        .fallback_reason = std::move(fallback_reason)};
}

}  // namespace

Result<CreatedBackend> create_backend(BackendOptions options) {
  if (options.choice == BackendOptions::Choice::kThreads) return create_threads({});
  auto ring = UringBackend::create();
  if (ring) return CreatedBackend{.backend = *std::move(ring), .fallback_reason = {}};
  std::string reason(ring.error().message());
  if (options.choice == BackendOptions::Choice::kUring) {
    return Error(Code::kUnavailable, std::move(reason), ring.error().native());
  }
  return create_threads(std::move(reason));
}

}  // namespace stillframe::uring
