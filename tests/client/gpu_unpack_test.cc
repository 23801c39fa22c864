// Small tensors that come to a GPU by the extent. On the simulated driver.
#include "client/gpu_unpack.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "base/check.h"
#include "base/hash.h"
#include "kernels/gpu_image.h"
#include "tests/format/seed.h"

namespace stillframe::client {
namespace {

// An image of 200 tensors of 5000 bytes, which lie behind each other on the GPU in reverse order.
class GpuUnpackTest : public ::testing::Test {
 protected:
  static constexpr std::uint64_t kTensorBytes = 5'000;
  static constexpr std::uint64_t kTensors = 200;

  void SetUp() override {
    auto driver = cuda::Driver::load();
    ASSERT_TRUE(driver) << driver.error().message();
    auto context = cuda::Context::retain(*driver, 0);
    ASSERT_TRUE(context) << context.error().message();
    context_ = *context;
    auto random = format::seeded_generator();
    image_.resize(kTensors * kTensorBytes);
    for (std::byte& byte : image_) byte = static_cast<std::byte>(random());
    tensors_ = allocate(image_.size());
    extent_ = allocate(kExtentBytes);
    for (std::uint64_t i = 0; i < kTensors; ++i) {
      part_.pieces.push_back(
          {.data = reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(at_gpu(i))),
           .image_offset = i * kTensorBytes,
           .bytes = kTensorBytes});
    }
    part_.image_bytes = image_.size();
    hash_ = hash_extent(image_);
    part_.extent_hashes = {&hash_, 1};
  }

  cuda::DeviceBuffer allocate(std::uint64_t bytes) const {
    auto buffer = cuda::allocate(context_, bytes);
    check(buffer.has_value(), "no memory on the simulated GPU");
    return *std::move(buffer);
  }
  CUdeviceptr at_gpu(std::uint64_t tensor) const {
    return tensors_.get() + (kTensors - 1 - tensor) * kTensorBytes;
  }
  std::vector<std::byte> read_tensor(std::uint64_t tensor, const GpuQueue& queue) const {
    std::vector<std::byte> bytes(kTensorBytes);
    const cuda::Current current(*context_);
    check(context_->calls().cuMemcpyDtoHAsync(bytes.data(), at_gpu(tensor), bytes.size(),
                                              queue.stream()) == CUDA_SUCCESS &&
              queue.wait().has_value(),
          "read from the GPU");
    return bytes;
  }

  std::shared_ptr<const cuda::Context> context_;
  std::vector<std::byte> image_;
  cuda::DeviceBuffer tensors_;
  cuda::DeviceBuffer extent_;
  std::uint64_t hash_ = 0;
  GpuUnpack::Part part_;
};

TEST_F(GpuUnpackTest, brings_every_tensor_of_an_extent_to_its_place) {
  if (kernels::gpu_image().empty()) GTEST_SKIP() << "built without nvcc";
  const auto unpack = GpuUnpack::create(context_, {&part_, 1});
  ASSERT_TRUE(unpack && *unpack);
  ASSERT_TRUE((*unpack)->takes(0, 0));
  const auto queue = GpuQueue::create(context_);
  ASSERT_TRUE(queue);
  ASSERT_TRUE((*unpack)->enqueue(0, 0, image_, extent_.get(), *queue));
  ASSERT_TRUE(queue->wait());
  EXPECT_TRUE((*unpack)->check());
  for (std::uint64_t i = 0; i < kTensors; ++i) {
    const auto held = read_tensor(i, *queue);
    EXPECT_TRUE(
        std::equal(held.begin(), held.end(), image_.begin() + static_cast<long>(i * kTensorBytes)))
        << i;
  }
}

TEST_F(GpuUnpackTest, tells_of_an_extent_that_was_damaged_on_its_way) {
  if (kernels::gpu_image().empty()) GTEST_SKIP() << "built without nvcc";
  const auto unpack = GpuUnpack::create(context_, {&part_, 1});
  ASSERT_TRUE(unpack && *unpack);
  const auto queue = GpuQueue::create(context_);
  ASSERT_TRUE(queue);
  image_.back() ^= std::byte{1};
  ASSERT_TRUE((*unpack)->enqueue(0, 0, image_, extent_.get(), *queue));
  ASSERT_TRUE(queue->wait());
  const auto checked = (*unpack)->check();
  ASSERT_FALSE(checked);
  EXPECT_EQ(checked.error().code(), Code::kDataLoss);
  // Brought once more, it is good.
  image_.back() ^= std::byte{1};
  ASSERT_TRUE((*unpack)->enqueue(0, 0, image_, extent_.get(), *queue));
  ASSERT_TRUE(queue->wait());
  EXPECT_TRUE((*unpack)->check());
}

TEST_F(GpuUnpackTest, leaves_few_tensors_and_files_without_hashes_alone) {
  GpuUnpack::Part foreign = part_;
  foreign.extent_hashes = {};
  auto unpack = GpuUnpack::create(context_, {&foreign, 1});
  ASSERT_TRUE(unpack);
  EXPECT_EQ(*unpack, nullptr);
  part_.pieces.resize(10);
  unpack = GpuUnpack::create(context_, {&part_, 1});
  ASSERT_TRUE(unpack);
  EXPECT_EQ(*unpack, nullptr);
}

}  // namespace
}  // namespace stillframe::client
