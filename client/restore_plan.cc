#include "client/restore_plan.h"

#include <algorithm>
#include <utility>

#include "base/text.h"
#include "client/capture_sources.h"

namespace stillframe::client {

namespace {

Result<kernels::Target> target_of(const format::PlacedTensor& tensor, const sf_target& given,
                                  RestorePlan& plan) {
  if (given.bytes != tensor.bytes) {
    return Error(Code::kInvalidArgument, concat("read: tensor ", tensor.spec.name, " has ",
                                                tensor.bytes, " bytes, the target ", given.bytes));
  }
  if (given.data == nullptr && tensor.bytes != 0) {
    return Error(Code::kInvalidArgument,
                 concat("read: the target of ", tensor.spec.name, " has no memory"));
  }
  if (given.memory != SF_MEMORY_HOST && given.memory != SF_MEMORY_CUDA) {
    return Error(Code::kInvalidArgument, concat("read: the memory of the target of ",
                                                tensor.spec.name, " is no sf_memory"));
  }
  kernels::Target target{.data = static_cast<std::byte*>(given.data),
                         .image_offset = tensor.offset,
                         .bytes = tensor.bytes,
                         .strides = nullptr};
  if (is_strided(tensor.spec, given.stride_bytes)) {
    if (given.memory == SF_MEMORY_CUDA) {
      return Error(Code::kInvalidArgument,
                   concat("read: the target of ", tensor.spec.name,
                          " is strided memory of a GPU; read into a contiguous one and copy"));
    }
    plan.strides.push_back(std::make_unique<kernels::Strides>(kernels::Strides{
        .element_bytes = static_cast<std::uint32_t>(format::element_bytes(tensor.spec.dtype)),
        .shape = tensor.spec.shape,
        .stride_bytes = {given.stride_bytes, given.stride_bytes + tensor.spec.shape.size()}}));
    target.strides = plan.strides.back().get();
  }
  return target;
}

// One that is still to be sorted by kind.
struct AnyTarget {
  kernels::Target target;
  bool is_on_gpu = false;

  std::uint64_t image_offset() const { return target.image_offset; }
};

// The extents that sorted targets touch, neighbours joined.
void add_wanted(std::size_t part, std::span<const AnyTarget> targets, RestorePlan& plan) {
  for (const auto& [target, is_on_gpu] : targets) {
    const std::uint64_t first = target.image_offset / kExtentBytes;
    const std::uint64_t end = (target.image_offset + target.bytes - 1) / kExtentBytes + 1;
    if (!plan.wanted.empty() && plan.wanted.back().part == part) {
      catalog::ExtentRange& last = plan.wanted.back();
      const std::uint64_t last_end = last.first_extent + last.extent_count;
      if (first <= last_end) {
        last.extent_count = std::max(end, last_end) - last.first_extent;
        continue;
      }
    }
    plan.wanted.push_back({.part = part, .first_extent = first, .extent_count = end - first});
  }
}

}  // namespace

TensorIndex::TensorIndex(const std::vector<catalog::OpenPart>& parts) : parts_(parts.size()) {
  for (std::size_t i = 0; i < parts.size(); ++i) {
    parts_[i].reserve(parts[i].image.tensors.size());
    for (const auto& tensor : parts[i].image.tensors) parts_[i].emplace(tensor.spec.name, &tensor);
  }
}

const format::PlacedTensor* TensorIndex::find(std::uint64_t part, std::string_view name) const {
  if (part >= parts_.size()) return nullptr;
  const auto found = parts_[part].find(name);
  return found == parts_[part].end() ? nullptr : found->second;
}

Result<RestorePlan> plan_restore(const std::vector<catalog::OpenPart>& parts,
                                 const TensorIndex& index, std::span<const sf_target> targets) {
  RestorePlan plan;
  plan.targets_by_part.resize(parts.size());
  plan.gpu_targets_by_part.resize(parts.size());
  std::vector<std::vector<AnyTarget>> by_part(parts.size());
  for (const sf_target& given : targets) {
    if (given.name == nullptr) return Error(Code::kInvalidArgument, "read: a target has no name");
    const format::PlacedTensor* const tensor = index.find(given.part_index, given.name);
    if (tensor == nullptr) {
      return Error(Code::kInvalidArgument, concat("read: no tensor ", given.name, " in part ",
                                                  given.part_index, " of ", parts.size()));
    }
    auto target = target_of(*tensor, given, plan);
    if (!target) return std::move(target).error();
    if (target->bytes == 0) continue;
    by_part[given.part_index].push_back(
        {.target = *target, .is_on_gpu = given.memory == SF_MEMORY_CUDA});
  }
  for (std::size_t i = 0; i < parts.size(); ++i) {
    std::vector<AnyTarget>& sorted = by_part[i];
    std::ranges::sort(sorted, {}, &AnyTarget::image_offset);
    const auto twice = std::ranges::adjacent_find(sorted, {}, &AnyTarget::image_offset);
    if (twice != sorted.end()) {
      return Error(Code::kInvalidArgument,
                   concat("read: two targets for one tensor of ", parts[i].file_name));
    }
    add_wanted(i, sorted, plan);
    for (const auto& [target, is_on_gpu] : sorted) {
      (is_on_gpu ? plan.gpu_targets_by_part : plan.targets_by_part)[i].push_back(target);
      plan.has_gpu_targets = plan.has_gpu_targets || is_on_gpu;
    }
  }
  for (const catalog::ExtentRange& range : plan.wanted) {
    const std::uint64_t begin = range.first_extent * kExtentBytes;
    plan.bytes += std::min(range.extent_count * kExtentBytes, parts[range.part].bytes - begin);
  }
  return plan;
}

}  // namespace stillframe::client
