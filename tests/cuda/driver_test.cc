// The driver's table and the owners of cuda/, on the simulated driver.
#include "cuda/driver.h"

#include <gtest/gtest.h>

#include <cstring>
#include <thread>
#include <vector>

#include "cuda/devices.h"
#include "cuda/pointer.h"
#include "cuda/resources.h"
#include "tests/simulated_cuda/control.h"

namespace stillframe::cuda {
namespace {

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    auto driver = Driver::load();
    ASSERT_TRUE(driver) << driver.error().message();
    driver_ = *driver;
    auto context = Context::retain(driver_, 1);
    ASSERT_TRUE(context) << context.error().message();
    context_ = *context;
  }
  void TearDown() override { simulated_cuda_heal(); }

  void wait(const Stream& stream) {
    const auto event = create_event(context_);
    ASSERT_TRUE(event);
    ASSERT_EQ(context_->calls().cuEventRecord(event->get(), stream.get()), CUDA_SUCCESS);
    while (context_->calls().cuEventQuery(event->get()) == CUDA_ERROR_NOT_READY) {
      std::this_thread::yield();
    }
  }

  std::shared_ptr<const Driver> driver_;
  std::shared_ptr<const Context> context_;
};

TEST_F(Cuda, the_gpus_are_listed_with_their_uuids) {
  const auto devices = list_devices(*driver_);
  ASSERT_TRUE(devices) << devices.error().message();
  ASSERT_EQ(devices->size(), 2U);
  EXPECT_EQ((*devices)[0].name, "Simulated GPU");
  EXPECT_EQ((*devices)[1].uuid, "GPU-51515151-5151-5151-5151-515151515151");
  EXPECT_EQ((*devices)[1].major, 9);
}

TEST_F(Cuda, a_gpu_that_is_not_there_is_refused_by_its_number) {
  const auto context = Context::retain(driver_, 7);
  ASSERT_FALSE(context);
  EXPECT_EQ(context.error().code(), Code::kInvalidArgument);
  EXPECT_NE(context.error().message().find("GPU 7"), std::string::npos);
}

TEST_F(Cuda, bytes_go_to_the_gpu_and_come_back) {
  const auto stream = create_stream(context_);
  const auto buffer = allocate(context_, 1000);
  ASSERT_TRUE(stream && buffer);
  std::vector<char> sent(1000, 'x');
  std::vector<char> received(1000);
  {
    const Current current(*context_);
    const Calls& calls = context_->calls();
    ASSERT_EQ(calls.cuMemcpyHtoDAsync(buffer->get(), sent.data(), 1000, stream->get()),
              CUDA_SUCCESS);
    ASSERT_EQ(calls.cuMemcpyDtoHAsync(received.data(), buffer->get(), 1000, stream->get()),
              CUDA_SUCCESS);
  }
  wait(*stream);
  EXPECT_EQ(received, sent);
}

TEST_F(Cuda, an_address_tells_whose_it_is) {
  const auto buffer = allocate(context_, 1000);
  ASSERT_TRUE(buffer);
  const auto* const inside = reinterpret_cast<const void*>(buffer->get() + 10);
  const auto facts = look_up_pointer(*driver_, inside);
  ASSERT_TRUE(facts);
  EXPECT_TRUE(facts->is_on_gpu);
  EXPECT_EQ(facts->ordinal, 1);
  EXPECT_EQ(facts->range_begin, buffer->get());
  EXPECT_EQ(facts->range_bytes, 1000U);
  const auto allocation = find_allocation(*context_, buffer->get() + 10);
  ASSERT_TRUE(allocation);
  EXPECT_EQ(*allocation, (Allocation{.begin = buffer->get(), .bytes = 1000}));
  int on_the_stack = 0;
  const auto host = look_up_pointer(*driver_, &on_the_stack);
  ASSERT_TRUE(host);
  EXPECT_FALSE(host->is_on_gpu);
}

TEST_F(Cuda, every_owner_ends_what_it_owns) {
  const auto before = simulated_cuda_count();
  {
    std::vector<std::byte> memory(4096);
    const auto stream = create_stream(context_);
    const auto event = create_event(context_);
    const auto buffer = allocate(context_, 5000);
    const auto host = allocate_host(context_, 6000);
    const auto registered = register_host(context_, memory);
    ASSERT_TRUE(stream && event && buffer && host && registered);
    EXPECT_TRUE(device_address(*context_, host->get()));
    EXPECT_TRUE(device_address(*context_, memory.data() + 5));
    const auto during = simulated_cuda_count();
    EXPECT_EQ(during.device_bytes, before.device_bytes + 5000);
    EXPECT_EQ(during.host_bytes, before.host_bytes + 6000 + 4096);
    EXPECT_EQ(during.handles, before.handles + 2);
  }
  const auto after = simulated_cuda_count();
  EXPECT_EQ(after.device_bytes, before.device_bytes);
  EXPECT_EQ(after.host_bytes, before.host_bytes);
  EXPECT_EQ(after.handles, before.handles);
}

TEST_F(Cuda, a_full_gpu_is_an_error_with_the_amount) {
  simulated_cuda_limit(1000);
  const auto buffer = allocate(context_, 5000);
  simulated_cuda_limit(std::uint64_t{4} << 30);
  ASSERT_FALSE(buffer);
  EXPECT_EQ(buffer.error().code(), Code::kResourceExhausted);
  EXPECT_EQ(buffer.error().native(), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_NE(buffer.error().message().find("5000 bytes of GPU 1: CUDA_ERROR_OUT_OF_MEMORY"),
            std::string::npos)
      << buffer.error().message();
}

TEST_F(Cuda, a_broken_context_is_an_error_of_every_call) {
  simulated_cuda_fail("cuEventCreate", 1, CUDA_ERROR_ILLEGAL_ADDRESS, true);
  const auto event = create_event(context_);
  ASSERT_FALSE(event);
  EXPECT_EQ(event.error().code(), Code::kUnavailable);
  EXPECT_FALSE(allocate(context_, 100));
  EXPECT_FALSE(Driver::load());
}

}  // namespace
}  // namespace stillframe::cuda
