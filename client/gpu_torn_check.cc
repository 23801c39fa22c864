#include "client/gpu_torn_check.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "base/text.h"

namespace stillframe::client {

namespace {

constexpr std::uint64_t kBlocksBytes = BlockSampler::kCountMax * kBlockBytes;
static_assert(kBlocksBytes <= kExtentBytes, "one extent of a pack job");
constexpr std::chrono::seconds kPatience{10};
constexpr std::chrono::microseconds kPollPause{20};

template <class T>
T* address_of(CUdeviceptr address) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

// The tensor of a part that begins at that offset of the image; empty ones come before it.
std::uint32_t source_at(const LayoutPart& part, std::uint64_t image_offset) {
  const auto behind =
      std::ranges::upper_bound(part.image.tensors, image_offset, {}, &format::PlacedTensor::offset);
  return static_cast<std::uint32_t>(behind - part.image.tensors.begin());
}

}  // namespace

Status GpuTornCheck::prepare(const GpuPlan::Share& share, const Layout& layout) {
  clear();
  layout_ = &layout;
  for (const GpuPlan::PartPieces& part : share.parts) {
    const LayoutPart& placed = layout.parts[part.part];
    for (const GpuPlan::Piece& piece : part.pieces) {
      if (piece.origin != GpuPlan::Origin::kTensor) continue;
      tensors_.push_back(
          {.data = piece.where,
           .slot_offset = placed.slot_offset + piece.image_offset,
           .bytes = piece.bytes,
           .place = {.part = part.part, .source = source_at(placed, piece.image_offset)}});
    }
  }
  if (is_ready()) return ok();
  const std::uint64_t tables =
      kernels::PackTables::bytes_for(BlockSampler::kCountMax, kBlocksBytes);
  auto gpu = cuda::allocate(context_, kBlocksBytes + tables + sizeof(std::uint64_t));
  if (!gpu) return std::move(gpu).error();
  auto host = cuda::allocate_host(context_, kBlocksBytes + tables);
  if (!host) return std::move(host).error();
  auto done = cuda::create_event(context_);
  if (!done) return std::move(done).error();
  gpu_ = *std::move(gpu);
  done_ = *std::move(done);
  host_ = *std::move(host);
  return ok();
}

Status GpuTornCheck::set_aside(const kernels::GpuKernels& kernels, CUstream trainer) {
  set_aside_length_ = 0;
  blocks_ = sampler_.choose(tensors_.size(), [this](std::size_t i) { return tensors_[i].bytes; });
  if (blocks_.empty()) return ok();
  std::vector<kernels::Piece> pieces;
  pieces.reserve(blocks_.size());
  std::uint64_t bytes = 0;
  for (const BlockSampler::Block& block : blocks_) {
    pieces.push_back({.data = address_of<std::byte>(tensors_[block.tensor].data + block.offset),
                      .image_offset = bytes,
                      .bytes = block.bytes});
    bytes += block.bytes;
  }
  tables_.clear();
  const std::size_t image = tables_.add(pieces, bytes);
  const ConstBytes tables = tables_.bytes();
  std::memcpy(set_aside_bytes() + kBlocksBytes, tables.data(), tables.size());

  const CUdeviceptr gpu = gpu_.get();
  const cuda::Current current(*context_);
  auto copied = context_->driver().check(
      "copy descriptors to a GPU",
      context_->calls().cuMemcpyHtoDAsync(gpu + kBlocksBytes, set_aside_bytes() + kBlocksBytes,
                                          tables.size(), trainer));
  if (!copied) return copied;
  kernels::PackJob job =
      tables_.job(image, gpu + kBlocksBytes, 0, 1, gpu + kBlocksBytes + tables.size());
  job.image = address_of<std::byte>(gpu);
  auto launched = kernels.pack(job, 1, trainer);
  if (launched) set_aside_length_ = bytes;
  return launched;
}

Status GpuTornCheck::fetch(CUstream stream) {
  if (set_aside_length_ == 0) return ok();
  const cuda::Current current(*context_);
  auto fetched = context_->driver().check(
      "copy blocks from a GPU",
      context_->calls().cuMemcpyDtoHAsync(host_.get(), gpu_.get(), set_aside_length_, stream));
  if (!fetched) return fetched;
  return context_->driver().check("mark a stream",
                                  context_->calls().cuEventRecord(done_.get(), stream));
}

Error GpuTornCheck::changed(const Tensor& tensor) const {
  return Error(Code::kDataLoss, concat("tensor ", layout_->tensor(tensor.place).spec.name,
                                       " changed while it was captured"));
}

Status GpuTornCheck::compare(ConstBytes slot) {
  if (std::exchange(set_aside_length_, 0) == 0) return ok();
  auto is_done = cuda::has_happened(*context_, done_);
  if (!is_done) return std::move(is_done).error();
  if (!*is_done) return Error(Code::kInternal, "a capture ended before its blocks were set aside");
  const std::byte* wanted = set_aside_bytes();
  for (const BlockSampler::Block& block : blocks_) {
    const Tensor& tensor = tensors_[block.tensor];
    if (std::memcmp(slot.data() + tensor.slot_offset + block.offset, wanted, block.bytes) != 0) {
      return changed(tensor);
    }
    wanted += block.bytes;
  }
  return ok();
}

Status GpuTornCheck::wait_for(CUstream stream) {
  const cuda::Current current(*context_);
  auto recorded = context_->driver().check("mark a stream",
                                           context_->calls().cuEventRecord(done_.get(), stream));
  if (!recorded) return recorded;
  const auto begin = std::chrono::steady_clock::now();
  for (;;) {
    auto is_done = cuda::has_happened(*context_, done_);
    if (!is_done) return std::move(is_done).error();
    if (*is_done) return ok();
    if (std::chrono::steady_clock::now() - begin > kPatience) {
      return Error(Code::kUnavailable, "a GPU did not end its copies within 10 s");
    }
    std::this_thread::sleep_for(kPollPause);
  }
}

Status GpuTornCheck::compare_all(ConstBytes slot, CUstream stream) {
  if (!is_ready()) return ok();
  for (const Tensor& tensor : tensors_) {
    for (std::uint64_t offset = 0; offset < tensor.bytes; offset += kBlocksBytes) {
      const std::uint64_t bytes = std::min(kBlocksBytes, tensor.bytes - offset);
      {
        const cuda::Current current(*context_);
        auto copied = context_->driver().check(
            "copy a tensor from a GPU",
            context_->calls().cuMemcpyDtoHAsync(host_.get(), tensor.data + offset, bytes, stream));
        if (!copied) return copied;
      }
      auto waited = wait_for(stream);
      if (!waited) return waited;
      if (std::memcmp(slot.data() + tensor.slot_offset + offset, host_.get(), bytes) != 0) {
        return changed(tensor);
      }
    }
  }
  return ok();
}

}  // namespace stillframe::client
