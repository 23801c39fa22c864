#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

#include "base/mapping.h"
#include "base/result.h"
#include "base/unique_fd.h"
#include "cuda/resources.h"

namespace stillframe::client {

// Words of shared memory that a GPU's streams wait for and a worker writes. This process can write
// them too, so that no stream ever waits for something that only another process can release.
//
// A stream may come to its wait long after the worker has gone: the words stay until no stream has
// one before it. Session thread, but release().
class GpuFence {
 public:
  static Result<std::unique_ptr<GpuFence>> make(
      const std::shared_ptr<const cuda::Context>& context);
  ~GpuFence();
  GpuFence(const GpuFence&) = delete;
  GpuFence& operator=(const GpuFence&) = delete;

  static constexpr std::uint64_t kBytes = 4096;
  int fd() const noexcept { return memory_.get(); }
  // A word for a worker that has written to none: one that is lost may still write to its own.
  std::uint32_t next_word() noexcept { return ++word_ % kWords; }
  std::uint32_t word() const noexcept { return word_ % kWords; }

  // Before a capture: the value that the worker is to write. Closed until then.
  std::uint32_t close();
  bool is_open() const noexcept;
  // Opens it without the worker. Any thread.
  void release() noexcept;
  // What is enqueued to the stream from now on waits for it. False: the driver cannot have streams
  // wait for memory; the caller waits instead.
  Result<bool> hold(CUstream stream);

 private:
  static constexpr std::uint32_t kWords = kBytes / sizeof(std::uint32_t);

  GpuFence() = default;
  std::atomic_ref<std::uint32_t> value() const noexcept {
    return std::atomic_ref(reinterpret_cast<std::uint32_t*>(words_.bytes().data())[word()]);
  }

  std::shared_ptr<const cuda::Context> context_;
  UniqueFd memory_;
  Mapping words_;
  cuda::HostRegistration registration_;
  CUdeviceptr address_ = 0;
  cuda::Event passed_;  // Behind the last wait.
  bool is_held_ = false;
  std::uint32_t word_ = 0;
  std::uint32_t target_ = 0;
};

}  // namespace stillframe::client
