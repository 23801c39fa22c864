#include "client/gpu_unpack.h"

#include <algorithm>
#include <utility>

#include "base/text.h"

namespace stillframe::client {

namespace {

// A copy of its own takes some microseconds whatever its size; below this many of them the extent
// itself takes longer.
constexpr std::uint32_t kPiecesMin = 16;

std::vector<bool> choose_extents(const GpuUnpack::Part& part) {
  const auto first = kernels::first_pieces(part.pieces, part.image_bytes);
  std::vector<bool> is_taken;
  for (std::size_t extent = 0; extent + 1 < first.size(); ++extent) {
    is_taken.push_back(first[extent + 1] - first[extent] >= kPiecesMin);
  }
  return is_taken;
}

}  // namespace

GpuUnpack::GpuUnpack(kernels::GpuKernels kernels, GpuQueue queue)
    : kernels_(std::move(kernels)), queue_(std::move(queue)) {}

Result<std::shared_ptr<GpuUnpack>> GpuUnpack::create(
    const std::shared_ptr<const cuda::Context>& context, std::span<const Part> parts) {
  std::vector<Image> images;
  kernels::PackTables tables;
  std::vector<std::uint64_t> hashes;
  for (const Part& part : parts) {
    Image& image = images.emplace_back();
    if (part.pieces.empty() || part.extent_hashes.empty()) continue;
    std::vector<bool> is_taken = choose_extents(part);
    if (std::ranges::find(is_taken, true) == is_taken.end()) continue;
    image = {.is_taken = std::move(is_taken),
             .table = tables.add(part.pieces, part.image_bytes),
             .first_hash = hashes.size()};
    hashes.insert(hashes.end(), part.extent_hashes.begin(), part.extent_hashes.end());
  }
  if (hashes.empty()) return std::shared_ptr<GpuUnpack>();

  auto kernels = kernels::GpuKernels::load(context);
  if (!kernels) return std::move(kernels).error();
  auto queue = GpuQueue::create(context);
  if (!queue) return std::move(queue).error();
  std::shared_ptr<GpuUnpack> unpack(new GpuUnpack(*std::move(kernels), *std::move(queue)));
  unpack->images_ = std::move(images);
  unpack->tables_ = std::move(tables);
  auto uploaded = unpack->upload(hashes);
  if (!uploaded) return std::move(uploaded).error();
  return unpack;
}

Status GpuUnpack::upload(std::span<const std::uint64_t> hashes) {
  extent_count_ = hashes.size();
  const ConstBytes tables = tables_.bytes();
  const ConstBytes expected = std::as_bytes(hashes);
  const std::uint64_t damaged_offset = tables.size() + expected.size();
  host_.resize(damaged_offset + extent_count_ * sizeof(std::uint32_t));
  std::ranges::copy(tables, host_.begin());
  std::ranges::copy(expected, host_.begin() + static_cast<std::ptrdiff_t>(tables.size()));
  auto buffer = cuda::allocate(queue_.context(), host_.size());
  if (!buffer) return std::move(buffer).error();
  buffer_ = *std::move(buffer);
  hashes_at_ = buffer_.get() + tables.size();
  damaged_at_ = buffer_.get() + damaged_offset;
  const cuda::Current current(*queue_.context());
  auto copied = queue_.context()->driver().check(
      "copy tables to a GPU", queue_.context()->calls().cuMemcpyHtoDAsync(
                                  buffer_.get(), host_.data(), host_.size(), queue_.stream()));
  if (!copied) return copied;
  return queue_.wait();
}

bool GpuUnpack::takes(std::size_t part, std::uint64_t extent) const noexcept {
  const std::vector<bool>& is_taken = images_[part].is_taken;
  return !is_taken.empty() && is_taken[extent];
}

Status GpuUnpack::enqueue(std::size_t part, std::uint64_t extent, ConstBytes bytes,
                          CUdeviceptr staging, const GpuQueue& queue) const {
  const cuda::Current current(*queue.context());
  auto copied = queue.context()->driver().check(
      "copy an extent to a GPU", queue.context()->calls().cuMemcpyHtoDAsync(
                                     staging, bytes.data(), bytes.size(), queue.stream()));
  if (!copied) return copied;
  const Image& image = images_[part];
  const std::uint64_t at = image.first_hash + extent;
  kernels::PackJob job =
      tables_.job(image.table, buffer_.get(), extent, 1, hashes_at_ + at * sizeof(std::uint64_t));
  job.image = reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(staging));
  job.damaged = reinterpret_cast<std::uint32_t*>(
      static_cast<std::uintptr_t>(damaged_at_ + at * sizeof(std::uint32_t)));
  return kernels_.unpack(job, 1, queue.stream());
}

Status GpuUnpack::check() const {
  host_.resize(extent_count_ * sizeof(std::uint32_t));
  const cuda::Current current(*queue_.context());
  auto copied = queue_.context()->driver().check(
      "copy what a GPU has found", queue_.context()->calls().cuMemcpyDtoHAsync(
                                       host_.data(), damaged_at_, host_.size(), queue_.stream()));
  if (!copied) return copied;
  auto waited = queue_.wait();
  if (!waited) return waited;
  if (std::ranges::all_of(host_, [](std::byte one) { return one == std::byte{0}; })) return ok();
  return Error(Code::kDataLoss, concat("extents that were good on the host have arrived damaged on "
                                       "GPU ",
                                       queue_.context()->ordinal()));
}

}  // namespace stillframe::client
