// The kernels as a driver launches them: on a stream, out of memory that only a GPU can reach.
#include "kernels/gpu_launch.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "base/hash.h"
#include "kernels/gpu_image.h"
#include "kernels/pack_table.h"
#include "tests/format/seed.h"
#include "tests/simulated_cuda/control.h"

namespace stillframe::kernels {
namespace {

class GpuLaunch : public ::testing::Test {
 protected:
  void SetUp() override {
    if (gpu_image().empty()) GTEST_SKIP() << "built without nvcc";
    auto driver = cuda::Driver::load();
    ASSERT_TRUE(driver) << driver.error().message();
    auto context = cuda::Context::retain(*driver, 0);
    ASSERT_TRUE(context) << context.error().message();
    context_ = *context;
    auto stream = cuda::create_stream(context_);
    ASSERT_TRUE(stream);
    stream_ = *std::move(stream);
  }

  CUdeviceptr put(const void* data, std::uint64_t bytes) {
    auto buffer = cuda::allocate(context_, bytes);
    check(buffer.has_value(), "no memory on the simulated GPU");
    {
      const cuda::Current current(*context_);
      check(context_->calls().cuMemcpyHtoDAsync(buffer->get(), data, bytes, stream_.get()) ==
                CUDA_SUCCESS,
            "copy to the GPU");
    }
    wait();
    buffers_.push_back(*std::move(buffer));
    return buffers_.back().get();
  }
  template <class T>
  std::vector<T> get(CUdeviceptr data, std::size_t count) {
    std::vector<T> values(count);
    {
      const cuda::Current current(*context_);
      check(context_->calls().cuMemcpyDtoHAsync(values.data(), data, count * sizeof(T),
                                                stream_.get()) == CUDA_SUCCESS,
            "copy from the GPU");
    }
    wait();
    return values;
  }
  void wait() {
    const auto event = cuda::create_event(context_);
    check(context_->calls().cuEventRecord(event->get(), stream_.get()) == CUDA_SUCCESS, "record");
    while (context_->calls().cuEventQuery(event->get()) != CUDA_SUCCESS) std::this_thread::yield();
  }

  std::shared_ptr<const cuda::Context> context_;
  cuda::Stream stream_;
  std::vector<cuda::DeviceBuffer> buffers_;
};

TEST_F(GpuLaunch, packs_three_tensors_and_unpacks_them_again) {
  auto random = format::seeded_generator();
  std::vector<std::byte> image;
  std::vector<Piece> pieces;
  for (const std::uint64_t bytes :
       {std::uint64_t{1'200'001}, std::uint64_t{7}, std::uint64_t{900'000}}) {
    std::vector<std::byte> tensor(bytes);
    for (std::byte& byte : tensor) byte = static_cast<std::byte>(random());
    pieces.push_back({.data = reinterpret_cast<std::byte*>(put(tensor.data(), bytes)),
                      .image_offset = image.size(),
                      .bytes = bytes});
    image.insert(image.end(), tensor.begin(), tensor.end());
  }
  const auto first = first_pieces(pieces, image.size());
  const std::uint64_t extent_count = first.size() - 1;
  const std::vector<std::byte> empty(round_up(image.size(), kLeafBytes));
  const std::vector<std::uint64_t> no_hashes(extent_count);
  const std::vector<std::uint32_t> no_damage(extent_count, 7);
  PackJob job{
      .pieces = reinterpret_cast<const Piece*>(put(pieces.data(), pieces.size() * sizeof(Piece))),
      .first_piece = reinterpret_cast<const std::uint32_t*>(
          put(first.data(), first.size() * sizeof(std::uint32_t))),
      .image_bytes = image.size(),
      .first_extent = 0,
      .extent_count = extent_count,
      .image = reinterpret_cast<std::byte*>(put(empty.data(), empty.size())),
      .extent_hashes = reinterpret_cast<std::uint64_t*>(
          put(no_hashes.data(), no_hashes.size() * sizeof(std::uint64_t))),
      .damaged = reinterpret_cast<std::uint32_t*>(
          put(no_damage.data(), no_damage.size() * sizeof(std::uint32_t)))};

  const auto kernels = GpuKernels::load(context_);
  ASSERT_TRUE(kernels) << kernels.error().message();
  ASSERT_TRUE(kernels->pack(job, 2, stream_.get()));
  auto packed = get<std::byte>(reinterpret_cast<CUdeviceptr>(job.image), image.size());
  EXPECT_EQ(packed, image);
  const auto hashes =
      get<std::uint64_t>(reinterpret_cast<CUdeviceptr>(job.extent_hashes), extent_count);
  for (std::uint64_t i = 0; i < extent_count; ++i) {
    const std::uint64_t begin = i * kExtentBytes;
    const auto bytes = std::min<std::uint64_t>(kExtentBytes, image.size() - begin);
    EXPECT_EQ(hashes[i], hash_extent(ConstBytes(image).subspan(begin, bytes)));
  }

  // Back into tensors that hold something else by now.
  const std::vector<std::byte> zeros(1'200'001);
  pieces[0].data = reinterpret_cast<std::byte*>(put(zeros.data(), zeros.size()));
  job.pieces = reinterpret_cast<const Piece*>(put(pieces.data(), pieces.size() * sizeof(Piece)));
  ASSERT_TRUE(kernels->unpack(job, 1, stream_.get()));
  const auto restored =
      get<std::byte>(reinterpret_cast<CUdeviceptr>(pieces[0].data), pieces[0].bytes);
  EXPECT_TRUE(std::equal(restored.begin(), restored.end(), image.begin()));
  EXPECT_EQ(get<std::uint32_t>(reinterpret_cast<CUdeviceptr>(job.damaged), extent_count),
            std::vector<std::uint32_t>(extent_count, 0));
}

}  // namespace
}  // namespace stillframe::kernels
