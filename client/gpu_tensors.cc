#include "client/gpu_tensors.h"

#include <algorithm>
#include <utility>

#include "base/text.h"
#include "client/capture_sources.h"
#include "cuda/pointer.h"

namespace stillframe::client {

namespace {

const void* pointer_to(std::uint64_t address) {
  return reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address));
}

Error no_gpu_memory(const format::PlacedTensor& tensor) {
  return Error(Code::kInvalidArgument, concat("save: tensor ", tensor.spec.name,
                                              " is not in a GPU's memory, though its source says "
                                              "so; or that memory was freed"));
}

}  // namespace

Result<std::optional<GpuTensors::Range>> GpuTensors::ask(
    const std::shared_ptr<const cuda::Driver>& driver, std::uint64_t address) {
  const auto facts = cuda::look_up_pointer(*driver, pointer_to(address));
  if (!facts) return facts.error();
  if (!facts->is_on_gpu) return std::optional<Range>();
  cuda::Allocation found{.begin = facts->range_begin, .bytes = facts->range_bytes};
  if (!facts->has_legacy_ipc) {
    // Perhaps mapped page by page, then only what is mapped here by one handle.
    std::shared_ptr<const cuda::Context>& context = contexts_[facts->ordinal];
    if (!context) {
      auto retained = cuda::Context::retain(driver, facts->ordinal);
      if (!retained) return std::move(retained).error();
      context = *std::move(retained);
    }
    const auto allocation = cuda::find_allocation(*context, address);
    if (!allocation) return std::optional<Range>();  // Reserved, but with nothing there any more.
    found = *allocation;
  }
  if (found.bytes == 0) found = {.begin = address, .bytes = 1};
  return std::optional(Range{.begin = found.begin,
                             .end = found.begin + found.bytes,
                             .ordinal = facts->ordinal,
                             .buffer_id = facts->buffer_id});
}

Result<const GpuTensors::Range*> GpuTensors::find_range(
    const std::shared_ptr<const cuda::Driver>& driver, std::uint64_t address) {
  auto at = std::ranges::upper_bound(ranges_, address, {}, &Range::begin);
  if (at != ranges_.begin() && address < std::prev(at)->end) return &*std::prev(at);
  const auto range = ask(driver, address);
  if (!range) return range.error();
  if (!*range) return nullptr;
  return &*ranges_.insert(at, **range);
}

Result<bool> GpuTensors::are_ranges_valid(const std::shared_ptr<const cuda::Driver>& driver) {
  for (const Range& range : ranges_) {
    const auto now = ask(driver, range.begin);
    if (!now) return now.error();
    if (*now != range) return false;
  }
  return true;
}

Result<bool> GpuTensors::update(const std::shared_ptr<const cuda::Driver>& driver,
                                const std::shared_ptr<const Layout>& layout,
                                std::span<const sf_source> sources, bool is_lazy) {
  const auto before = std::exchange(tensors_, {});
  bool is_same = layout_ == layout;
  if (is_same) {
    auto valid = are_ranges_valid(driver);
    if (!valid) return valid;
    is_same = *valid;
  }
  if (!is_same) ranges_.clear();
  layout_ = layout;
  tensors_.reserve(before.size());
  for (std::uint32_t i = 0; i < sources.size(); ++i) {
    if (sources[i].memory != SF_MEMORY_CUDA) continue;
    const format::PlacedTensor& placed = layout->tensor(layout->tensors[i]);
    if (placed.bytes == 0) continue;
    GpuTensor tensor{.index = i,
                     .data = reinterpret_cast<std::uintptr_t>(sources[i].data),
                     .ordinal = 0,
                     .is_early = is_lazy && sources[i].lazy == 0,
                     .stride_bytes = {}};
    std::uint64_t last = tensor.data + placed.bytes - 1;
    if (is_strided(placed.spec, sources[i].stride_bytes)) {
      tensor.stride_bytes.assign(sources[i].stride_bytes,
                                 sources[i].stride_bytes + placed.spec.shape.size());
      last = tensor.data;
    }
    auto first_range = find_range(driver, tensor.data);
    if (!first_range) return std::move(first_range).error();
    if (*first_range == nullptr) return no_gpu_memory(placed);
    tensor.ordinal = (*first_range)->ordinal;
    auto last_range = find_range(driver, last);
    if (!last_range) return std::move(last_range).error();
    if (*last_range == nullptr || (*last_range)->ordinal != tensor.ordinal) {
      return no_gpu_memory(placed);
    }
    tensors_.push_back(std::move(tensor));
  }
  return !is_same || tensors_ != before;
}

}  // namespace stillframe::client
