// What a real driver leaves undefined, or refuses at some later time, ends the process on the
// simulated one, with its reason: so no other test can rely on it unseen.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <memory>
#include <thread>
#include <vector>

#include "cuda/resources.h"
#include "cuda/shared_buffer.h"

namespace stillframe::cuda {
namespace {

class SimulatedRulesDeathTest : public ::testing::Test {
 protected:
  void SetUp() override {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    auto driver = Driver::load();
    ASSERT_TRUE(driver) << driver.error().message();
    auto context = Context::retain(*driver, 0);
    ASSERT_TRUE(context) << context.error().message();
    context_ = *context;
    auto buffer = allocate(context_, kBytes);
    ASSERT_TRUE(buffer) << buffer.error().message();
    buffer_ = *std::move(buffer);
  }

  const Calls& calls() const { return context_->calls(); }
  // Of a GPU's memory to the host; what it may not touch it finds in its own time.
  void copy(CUdeviceptr source, std::size_t bytes) const {
    std::vector<char> target(bytes);
    const auto stream = create_stream(context_);
    const auto event = create_event(context_);
    const Current current(*context_);
    (void)calls().cuMemcpyDtoHAsync(target.data(), source, bytes, stream->get());
    (void)calls().cuEventRecord(event->get(), stream->get());
    while (calls().cuEventQuery(event->get()) == CUDA_ERROR_NOT_READY) std::this_thread::yield();
  }

  static constexpr std::size_t kBytes = 1000;
  std::shared_ptr<const Context> context_;
  DeviceBuffer buffer_;
};

TEST_F(SimulatedRulesDeathTest, memory_that_was_freed_is_not_touched) {
  const CUdeviceptr freed = buffer_.get();
  buffer_ = {};
  EXPECT_DEATH(copy(freed, 10), "memory that is no allocation's, or was freed");
}

TEST_F(SimulatedRulesDeathTest, nothing_reaches_past_an_allocation) {
  EXPECT_DEATH(copy(buffer_.get() + kBytes - 10, 11), "memory that is no allocation's");
}

TEST_F(SimulatedRulesDeathTest, a_handle_is_not_opened_by_the_process_that_made_it) {
  const auto handle = ipc_handle_of(*context_, buffer_.get());
  ASSERT_TRUE(handle) << handle.error().message();
  EXPECT_DEATH((void)open_ipc_handle(context_, *handle), "in the process that made it");
}

TEST_F(SimulatedRulesDeathTest, what_another_process_has_open_is_not_freed) {
  const auto free_what_is_open = [this] {
    const auto handle = ipc_handle_of(*context_, buffer_.get());
    int ends[2] = {};
    if (!handle || ::pipe(ends) != 0) return;
    if (::fork() == 0) {
      (void)::prctl(PR_SET_PDEATHSIG, SIGKILL);
      const auto opened = open_ipc_handle(context_, *handle);
      if (opened) (void)!::write(ends[1], "", 1);
      ::pause();
      ::_exit(0);
    }
    char is_open = 0;
    (void)!::read(ends[0], &is_open, 1);
    buffer_ = {};
  };
  EXPECT_DEATH(free_what_is_open(), "an allocation that another process has open");
}

TEST_F(SimulatedRulesDeathTest, an_event_that_was_destroyed_is_not_used) {
  auto event = create_event(context_);
  ASSERT_TRUE(event) << event.error().message();
  const CUevent destroyed = event->get();
  event = create_event(context_);
  EXPECT_DEATH((void)calls().cuEventQuery(destroyed), "an event that was destroyed");
}

TEST_F(SimulatedRulesDeathTest, no_context_is_made_beside_the_frameworks_own) {
  CUcontext second = nullptr;
  EXPECT_DEATH((void)::cuCtxCreate(&second, nullptr, 0, context_->device()), "a context is made");
}

}  // namespace
}  // namespace stillframe::cuda
