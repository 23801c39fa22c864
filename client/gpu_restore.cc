#include "client/gpu_restore.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/text.h"
#include "cuda/pointer.h"

namespace stillframe::client {

Result<GpuTargets> GpuTargets::find(const RestorePlan& plan,
                                    const std::vector<catalog::OpenPart>& parts) {
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
      if (found.gpus_.contains(first->ordinal)) continue;
      auto context = cuda::Context::retain(*driver, first->ordinal);
      if (!context) return std::move(context).error();
      const cuda::Current current(**context);
      auto settled = (*driver)->check(concat("wait for GPU ", first->ordinal),
                                      (*driver)->calls().cuCtxSynchronize());
      if (!settled) return std::move(settled).error();
      found.gpus_.emplace(first->ordinal, Gpu{.context = *std::move(context), .unpack = nullptr});
    }
  }
  found.prepare_unpacking(parts);
  return found;
}

void GpuTargets::prepare_unpacking(const std::vector<catalog::OpenPart>& parts) {
  for (auto& [ordinal, gpu] : gpus_) {
    std::vector<GpuUnpack::Part> shares;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      GpuUnpack::Part& share = shares.emplace_back();
      share.image_bytes = parts[i].bytes;
      share.extent_hashes = parts[i].extent_hashes;
      for (const Target& target : by_part_[i]) {
        if (target.ordinal != ordinal) continue;
        share.pieces.push_back({.data = reinterpret_cast<std::byte*>(target.data),
                                .image_offset = target.image_offset,
                                .bytes = target.bytes});
      }
    }
    // Where it cannot be had, copies of their own do.
    auto unpack = GpuUnpack::create(gpu.context, shares);
    if (unpack) gpu.unpack = *std::move(unpack);
  }
}

std::vector<GpuTargets::Target>::const_iterator GpuTargets::first_behind(
    std::size_t part, std::uint64_t offset) const {
  return std::ranges::partition_point(by_part_[part], [offset](const Target& one) {
    return one.image_offset + one.bytes <= offset;
  });
}

Status GpuTargets::check() const {
  for (const auto& [ordinal, gpu] : gpus_) {
    if (!gpu.unpack) continue;
    auto checked = gpu.unpack->check();
    if (!checked) return checked;
  }
  return ok();
}

Result<GpuFiller> GpuFiller::create(const GpuTargets* targets) {
  GpuFiller filler;
  filler.targets_ = targets;
  if (targets == nullptr) return filler;
  for (const auto& [ordinal, gpu] : targets->gpus_) {
    auto queue = GpuQueue::create(gpu.context);
    if (!queue) return std::move(queue).error();
    Device device{.unpack = nullptr, .extent = {}, .copied = {}, .queue = *std::move(queue)};
    for (cuda::Event& copied : device.copied) {
      auto event = cuda::create_event(gpu.context);
      if (!event) return std::move(event).error();
      copied = *std::move(event);
    }
    if (gpu.unpack) {
      auto extent = cuda::allocate(gpu.context, kExtentBytes);
      if (extent) {
        device.extent = *std::move(extent);
        device.unpack = gpu.unpack;
      }
    }
    filler.devices_.emplace(ordinal, std::move(device));
  }
  auto staging =
      cuda::allocate_host(targets->gpus_.begin()->second.context, kHalfCount * kExtentBytes);
  if (staging) filler.staging_ = *std::move(staging);
  return filler;
}

Status GpuFiller::fill(std::size_t part, std::uint64_t offset, ConstBytes bytes) {
  if (targets_ == nullptr) return ok();
  for (std::size_t done = 0; done < bytes.size(); done += kExtentBytes) {
    const ConstBytes extent = bytes.subspan(done, std::min(kExtentBytes, bytes.size() - done));
    if (!is_wanted(part, offset + done, extent.size())) continue;
    const auto staged = stage(extent);
    if (!staged) return staged.error();
    auto given = give_out(part, offset + done, *staged);
    // Also after an error: some of it may be on its way.
    auto released = release();
    if (!given) return given;
    if (!released) return released;
  }
  return ok();
}

bool GpuFiller::is_wanted(std::size_t part, std::uint64_t offset, std::uint64_t bytes) const {
  const auto target = targets_->first_behind(part, offset);
  return target != targets_->by_part_[part].end() && target->image_offset < offset + bytes;
}

// To page-locked memory, when the GPUs have copied what was there before.
Result<ConstBytes> GpuFiller::stage(ConstBytes extent) {
  if (!staging_) return extent;
  half_ = (half_ + 1) % kHalfCount;
  for (auto& [ordinal, device] : devices_) {
    if (!device.is_copying[half_]) continue;
    auto waited = device.queue.wait_for(device.copied[half_]);
    if (!waited) return std::move(waited).error();
    device.is_copying[half_] = false;
  }
  auto* const begin = static_cast<std::byte*>(staging_.get()) + half_ * kExtentBytes;
  std::memcpy(begin, extent.data(), extent.size());
  return ConstBytes(begin, extent.size());
}

Status GpuFiller::give_out(std::size_t part, std::uint64_t offset, ConstBytes extent) {
  auto unpacked = unpack(part, offset / kExtentBytes, extent);
  return unpacked ? copy(part, offset, extent) : unpacked;
}

// What was given out may be overwritten when this has happened, or has returned.
Status GpuFiller::release() {
  if (!staging_) return wait();
  Status result = ok();
  for (auto& [ordinal, device] : devices_) {
    if (!std::exchange(device.is_given, false)) continue;
    auto marked = device.queue.mark(device.copied[half_]);
    if (marked) device.is_copying[half_] = true;
    if (!marked && result) result = std::move(marked);
  }
  return result;
}

// On the GPUs to which the extent comes whole.
Status GpuFiller::unpack(std::size_t part, std::uint64_t extent, ConstBytes bytes) {
  for (auto& [ordinal, device] : devices_) {
    if (!device.unpack || !device.unpack->takes(part, extent)) continue;
    device.is_used = device.is_given = true;
    auto enqueued = device.unpack->enqueue(part, extent, bytes, device.extent.get(), device.queue);
    if (!enqueued) return enqueued;
  }
  return ok();
}

// On the others, target by target.
Status GpuFiller::copy(std::size_t part, std::uint64_t offset, ConstBytes bytes) {
  auto target = targets_->first_behind(part, offset);
  const auto end_of_targets = targets_->by_part_[part].end();
  for (; target != end_of_targets && target->image_offset < offset + bytes.size(); ++target) {
    Device& device = devices_.at(target->ordinal);
    if (device.unpack && device.unpack->takes(part, offset / kExtentBytes)) continue;
    const std::uint64_t begin = std::max(offset, target->image_offset);
    const std::uint64_t end = std::min(offset + bytes.size(), target->image_offset + target->bytes);
    const cuda::Context& context = *device.queue.context();
    const cuda::Current current(context);
    device.is_used = device.is_given = true;
    auto copied = context.driver().check(
        "copy a tensor to a GPU",
        context.calls().cuMemcpyHtoDAsync(target->data + (begin - target->image_offset),
                                          bytes.data() + (begin - offset), end - begin,
                                          device.queue.stream()));
    if (!copied) return copied;
  }
  return ok();
}

Status GpuFiller::wait() {
  for (auto& [ordinal, device] : devices_) {
    if (!std::exchange(device.is_used, false)) continue;
    auto waited = device.queue.wait();
    if (!waited) return waited;
  }
  return ok();
}

}  // namespace stillframe::client
