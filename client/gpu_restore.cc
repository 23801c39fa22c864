#include "client/gpu_restore.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "base/text.h"
#include "cuda/pointer.h"

namespace stillframe::client {

namespace {

constexpr std::chrono::seconds kPatience{10};
constexpr std::chrono::microseconds kPollPause{20};

}  // namespace

Result<GpuTargets> GpuTargets::find(const RestorePlan& plan) {
  auto driver = cuda::Driver::load();
  if (!driver) return std::move(driver).error();
  GpuTargets found;
  for (const std::vector<kernels::Target>& part : plan.gpu_targets_by_part) {
    std::vector<Target>& targets = found.by_part_.emplace_back();
    for (const kernels::Target& given : part) {
      const auto first = cuda::look_up_pointer(**driver, given.data);
      if (!first) return first.error();
      const auto last = cuda::look_up_pointer(**driver, given.data + given.bytes - 1);
      if (!last) return last.error();
      if (!first->is_on_gpu || !last->is_on_gpu || first->ordinal != last->ordinal) {
        return Error(Code::kInvalidArgument,
                     concat("read: the target of ", given.bytes, " bytes at offset ",
                            given.image_offset, " is not in a GPU's memory"));
      }
      targets.push_back({.data = reinterpret_cast<std::uintptr_t>(given.data),
                         .image_offset = given.image_offset,
                         .bytes = given.bytes,
                         .ordinal = first->ordinal});
      if (found.contexts_.contains(first->ordinal)) continue;
      auto context = cuda::Context::retain(*driver, first->ordinal);
      if (!context) return std::move(context).error();
      const cuda::Current current(**context);
      auto settled = (*driver)->check(concat("wait for GPU ", first->ordinal),
                                      (*driver)->calls().cuCtxSynchronize());
      if (!settled) return std::move(settled).error();
      found.contexts_.emplace(first->ordinal, *std::move(context));
    }
  }
  return found;
}

Result<GpuFiller> GpuFiller::create(const GpuTargets* targets) {
  GpuFiller filler;
  filler.targets_ = targets;
  if (targets == nullptr) return filler;
  for (const auto& [ordinal, context] : targets->contexts_) {
    auto stream = cuda::create_stream(context);
    if (!stream) return std::move(stream).error();
    auto event = cuda::create_event(context);
    if (!event) return std::move(event).error();
    filler.devices_.emplace(ordinal, Device{.context = context,
                                            .stream = *std::move(stream),
                                            .event = *std::move(event),
                                            .is_used = false});
  }
  return filler;
}

Status GpuFiller::fill(std::size_t part, std::uint64_t offset, ConstBytes bytes) {
  if (targets_ == nullptr) return ok();
  const std::span<const GpuTargets::Target> targets = targets_->by_part_[part];
  // The first that ends behind `offset`; they do not overlap.
  auto target = std::ranges::partition_point(targets, [offset](const GpuTargets::Target& one) {
    return one.image_offset + one.bytes <= offset;
  });
  for (; target != targets.end() && target->image_offset < offset + bytes.size(); ++target) {
    const std::uint64_t begin = std::max(offset, target->image_offset);
    const std::uint64_t end = std::min(offset + bytes.size(), target->image_offset + target->bytes);
    Device& device = devices_.at(target->ordinal);
    const cuda::Current current(*device.context);
    device.is_used = true;
    auto copied = device.context->driver().check(
        "copy a tensor to a GPU",
        device.context->calls().cuMemcpyHtoDAsync(target->data + (begin - target->image_offset),
                                                  bytes.data() + (begin - offset), end - begin,
                                                  device.stream.get()));
    if (!copied) return copied;
  }
  return ok();
}

Status GpuFiller::wait() {
  for (auto& [ordinal, device] : devices_) {
    if (!std::exchange(device.is_used, false)) continue;
    const cuda::Current current(*device.context);
    const cuda::Calls& calls = device.context->calls();
    const auto begin = std::chrono::steady_clock::now();
    CUresult result = calls.cuEventRecord(device.event.get(), device.stream.get());
    while (result == CUDA_SUCCESS || result == CUDA_ERROR_NOT_READY) {
      result = calls.cuEventQuery(device.event.get());
      if (result == CUDA_SUCCESS) break;
      if (std::chrono::steady_clock::now() - begin > kPatience) {
        return Error(Code::kUnavailable,
                     concat("GPU ", ordinal, " did not end its copies within 10 s"));
      }
      std::this_thread::sleep_for(kPollPause);
    }
    auto waited = device.context->driver().check("wait for a GPU", result);
    if (!waited) return waited;
  }
  return ok();
}

}  // namespace stillframe::client
