#include "client/gpu_restore.h"

#include <algorithm>
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
    Device device{.unpack = nullptr, .extent = {}, .queue = *std::move(queue)};
    if (gpu.unpack) {
      auto extent = cuda::allocate(gpu.context, kExtentBytes);
      if (extent) {
        device.extent = *std::move(extent);
        device.unpack = gpu.unpack;
      }
    }
    filler.devices_.emplace(ordinal, std::move(device));
  }
  return filler;
}

Status GpuFiller::fill(std::size_t part, std::uint64_t offset, ConstBytes bytes) {
  if (targets_ == nullptr) return ok();
  for (std::size_t done = 0; done < bytes.size(); done += kExtentBytes) {
    const ConstBytes extent = bytes.subspan(done, std::min(kExtentBytes, bytes.size() - done));
    auto unpacked = unpack(part, (offset + done) / kExtentBytes, extent);
    if (!unpacked) return unpacked;
    auto copied = copy(part, offset + done, extent);
    if (!copied) return copied;
  }
  return ok();
}

// On the GPUs to which the extent comes whole.
Status GpuFiller::unpack(std::size_t part, std::uint64_t extent, ConstBytes bytes) {
  for (auto& [ordinal, device] : devices_) {
    if (!device.unpack || !device.unpack->takes(part, extent)) continue;
    device.is_used = true;
    auto enqueued = device.unpack->enqueue(part, extent, bytes, device.extent.get(), device.queue);
    if (!enqueued) return enqueued;
  }
  return ok();
}

// On the others, target by target.
Status GpuFiller::copy(std::size_t part, std::uint64_t offset, ConstBytes bytes) {
  const std::span<const GpuTargets::Target> targets = targets_->by_part_[part];
  // The first that ends behind `offset`; they do not overlap.
  auto target = std::ranges::partition_point(targets, [offset](const GpuTargets::Target& one) {
    return one.image_offset + one.bytes <= offset;
  });
  for (; target != targets.end() && target->image_offset < offset + bytes.size(); ++target) {
    Device& device = devices_.at(target->ordinal);
    if (device.unpack && device.unpack->takes(part, offset / kExtentBytes)) continue;
    const std::uint64_t begin = std::max(offset, target->image_offset);
    const std::uint64_t end = std::min(offset + bytes.size(), target->image_offset + target->bytes);
    const cuda::Context& context = *device.queue.context();
    const cuda::Current current(context);
    device.is_used = true;
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
