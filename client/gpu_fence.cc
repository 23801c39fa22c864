#include "client/gpu_fence.h"

#include <new>
#include <utility>

#include "shm/sealed_memory.h"

namespace stillframe::client {

Result<std::unique_ptr<GpuFence>> GpuFence::make(
    const std::shared_ptr<const cuda::Context>& context) {
  std::unique_ptr<GpuFence> fence(new GpuFence);
  fence->context_ = context;
  auto memory = shm::make_memfd("stillframe-fence");
  if (!memory) return std::move(memory).error();
  fence->memory_ = *std::move(memory);
  auto sealed = shm::set_length_and_seal(fence->memory_.get(), kBytes, shm::kLengthSeals);
  if (!sealed) return std::move(sealed).error();
  auto words = shm::map_shared(fence->memory_.get(), kBytes, kBytes);
  if (!words) return std::move(words).error();
  fence->words_ = *std::move(words);
  auto registered = cuda::register_host(context, fence->words_.bytes());
  if (!registered) return std::move(registered).error();
  fence->registration_ = *std::move(registered);
  auto address = cuda::device_address(*context, fence->words_.bytes().data());
  if (!address) return std::move(address).error();
  fence->address_ = *address;
  auto passed = cuda::create_event(context);
  if (!passed) return std::move(passed).error();
  fence->passed_ = *std::move(passed);
  return fence;
}

GpuFence::~GpuFence() {
  if (!is_held_) return;
  release();
  const auto passed = cuda::has_happened(*context_, passed_);
  if (passed && *passed) return;
  // A stream has yet to look at it: 4 KiB that nobody gets back.
  (void)new (std::nothrow) cuda::HostRegistration(std::move(registration_));
  (void)new (std::nothrow) Mapping(std::move(words_));
  (void)new (std::nothrow) cuda::Event(std::move(passed_));
}

std::uint32_t GpuFence::close() {
  target_ = value().load() + 1;
  return target_;
}

bool GpuFence::is_open() const noexcept {
  return static_cast<std::int32_t>(value().load(std::memory_order_acquire) - target_) >= 0;
}

void GpuFence::release() noexcept { value().store(target_, std::memory_order_release); }

Result<bool> GpuFence::hold(CUstream stream) {
  if (is_open()) return true;
  const cuda::Current current(*context_);
  const CUresult waits = context_->calls().cuStreamWaitValue32(
      stream, address_ + word() * sizeof(std::uint32_t), target_, CU_STREAM_WAIT_VALUE_GEQ);
  if (waits == CUDA_ERROR_NOT_SUPPORTED) return false;
  auto held = context_->driver().check("hold the trainer's stream", waits);
  if (!held) return std::move(held).error();
  is_held_ = true;
  auto recorded = context_->driver().check("mark the fence",
                                           context_->calls().cuEventRecord(passed_.get(), stream));
  if (!recorded) return std::move(recorded).error();
  return true;
}

}  // namespace stillframe::client
