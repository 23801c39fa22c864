// Captures and restores that the simulated driver counts, or makes fail: no memory, calls that
// fail, a context that is broken.
#include <gtest/gtest.h>

#include <iostream>
#include <string>
#include <vector>

#include "tests/simulated_cuda/control.h"
#include "tests/support/gpu_lane.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/lsan_interface.h>
#endif

namespace stillframe::testing {
namespace {

// While it lives, what this thread allocates may be leaked: what a GPU that no longer answers may
// still use is never freed.
class MayLeak {
 public:
#if defined(__SANITIZE_ADDRESS__)
  MayLeak() { __lsan_disable(); }
  ~MayLeak() { __lsan_enable(); }
#else
  MayLeak() {}
#endif
  MayLeak(const MayLeak&) = delete;
  MayLeak& operator=(const MayLeak&) = delete;
};

// Of the calls that fail; a sanitizer's build takes a part of those that the plain one takes all
// of.
constexpr std::uint64_t kStride = kIsSanitized ? 7 : 1;

class GpuCapture : public GpuLane {
 protected:
  void SetUp() override {
    before_ = simulated_cuda_count();
    GpuLane::SetUp();
  }
  void TearDown() override {
    simulated_cuda_heal();
    simulated_cuda_slow(0);
    simulated_cuda_limit(std::uint64_t{4} << 30);
    trainer_.reset();
    if (may_leak_) return;
    // Whatever happened, the GPUs are as they were.
    const auto after = simulated_cuda_count();
    EXPECT_EQ(after.device_bytes, before_.device_bytes);
    EXPECT_EQ(after.host_bytes, before_.host_bytes);
    EXPECT_EQ(after.handles, before_.handles);
  }

  simulated_cuda_counts before_ = {};
  bool may_leak_ = false;
};

// Nothing is fetched here, which would have the save wait for the GPU.
TEST_F(GpuCapture, launches_a_kernel_for_each_part_and_gpu_however_many_tensors) {
  std::vector<Tensor> tensors(2'000, {.place = Place::kGpu0, .bytes = 100, .is_lazy = true});
  auto& trainer = train(std::move(tensors));
  trainer.fill(1);
  const std::uint64_t launches = simulated_cuda_count().launches;
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  EXPECT_EQ(simulated_cuda_count().launches, launches + 2);
  EXPECT_EQ(trainer.judge_newest(1), "");
  // When each slot has had its turn, a save asks the driver about its allocations, for nothing new.
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  const auto second = simulated_cuda_count();
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  const auto third = simulated_cuda_count();
  EXPECT_EQ(third.device_bytes, second.device_bytes);
  EXPECT_EQ(third.host_bytes, second.host_bytes);
  EXPECT_EQ(third.handles, second.handles);
  EXPECT_EQ(trainer.close(), SF_OK);
}

// An extent for each half of the window, so that there are many turns.
TEST_F(GpuCapture, without_memory_for_a_window_writes_to_the_slot_itself) {
  auto& trainer = train(GpuTrainer::mixed_tensors());
  trainer.fill(1);
  // A GPU whose trainer left 300 000 bytes: descriptors and early copies fit, no window does.
  simulated_cuda_limit(simulated_cuda_count().device_bytes + 300'000);
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(1), "");
  EXPECT_NE(trainer.describe().find("without a window on GPU 0: allocate"), std::string::npos)
      << trainer.describe();
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuCapture, without_memory_for_early_copies_lets_the_trainer_wait) {
  std::vector<Tensor> tensors = GpuTrainer::mixed_tensors();
  tensors[2].bytes = 1'000'000;
  auto& trainer = train(std::move(tensors));
  trainer.fill(1);
  simulated_cuda_limit(simulated_cuda_count().device_bytes + 300'000);
  std::uint64_t ticket = 0;
  ASSERT_EQ(trainer.begin_save(1, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
  trainer.fill(2);                                   // No fence: all was taken before.
  ASSERT_EQ(trainer.publish(ticket), SF_DATA_LOSS);  // But for the host's, which is lazy still.
  EXPECT_NE(std::string(trainer.error().message).find("tensor5 changed"), std::string::npos)
      << trainer.error().message;
  trainer.fill(3);
  ASSERT_EQ(trainer.begin_save(3, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
  trainer.fill(4, Which::kEarly);
  ASSERT_EQ(trainer.publish(ticket), SF_OK) << trainer.error().message;
  ASSERT_EQ(trainer.wait_durable(ticket), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(3), "");
  EXPECT_NE(trainer.describe().find("eager, for a GPU has no memory left"), std::string::npos);
  EXPECT_EQ(trainer.close(), SF_OK);
}

// The optimizer's step waits on the GPU, where the trainer's own clock does not see it.
TEST_F(GpuCapture, tells_how_long_the_trainers_stream_waited_at_the_fence) {
  constexpr int kCopyMs = 30;
  constexpr std::int64_t kNsPerMs = 1'000'000;
  // Five chunks of one extent: the third can be packed when the first has been copied.
  auto& trainer = train({{.place = Place::kGpu0, .bytes = 5'000'000, .is_lazy = true}},
                        {.name = "pinned", .window_bytes = 2U << 20U});
  simulated_cuda_slow(kCopyMs);
  std::vector<std::int64_t> waited_ns;
  for (const bool is_late : {false, true}) {
    trainer.fill(1);
    trainer.wait_gpus();
    std::uint64_t ticket = 0;
    ASSERT_EQ(trainer.begin_save(1, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
    sf_session* const session = trainer.session();
    // When all has been captured before the fence, no stream waits there.
    if (is_late) {
      ASSERT_EQ(sf_capture_wait(session, ticket, 10'000, 0, nullptr), SF_OK);
    }
    ASSERT_EQ(trainer.fence(ticket), SF_OK) << trainer.error().message;
    ASSERT_EQ(sf_capture_wait(session, ticket, 10'000, 0, nullptr), SF_OK);
    ASSERT_EQ(sf_capture_publish(session, ticket, nullptr), SF_OK);
    sf_ticket info = {};
    info.struct_bytes = sizeof info;
    ASSERT_EQ(sf_ticket_get(session, ticket, &info, nullptr), SF_OK);
    waited_ns.push_back(info.fence_wait_ns);
    ASSERT_EQ(trainer.wait_durable(ticket), SF_OK) << trainer.error().message;
    EXPECT_EQ(trainer.judge_newest(1), "");
  }
  EXPECT_GE(waited_ns[0], 2 * kCopyMs * kNsPerMs);
  EXPECT_LT(waited_ns[1], waited_ns[0]);
  EXPECT_EQ(trainer.close(), SF_OK);
}

// As torch.cuda.graph() does on the training's thread, while ours are at work.
TEST_F(GpuCapture, does_not_disturb_a_thread_that_records_a_graph) {
  auto& trainer = train(GpuTrainer::mixed_tensors(), {.name = "pinned", .window_bytes = 2U << 20U});
  trainer.fill(1);
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  trainer.fill(2);
  std::uint64_t ticket = 0;
  ASSERT_EQ(trainer.begin_save(2, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
  simulated_cuda_record(true);
  EXPECT_EQ(sf_capture_wait(trainer.session(), ticket, 10'000, 0, nullptr), SF_OK);
  ASSERT_EQ(trainer.publish(ticket), SF_OK) << trainer.error().message;
  ASSERT_EQ(trainer.wait_durable(ticket), SF_OK) << trainer.error().message;
  simulated_cuda_record(false);
  EXPECT_EQ(trainer.judge_newest(2), "");
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuCapture, of_memory_that_was_freed_is_refused_with_the_tensors_name) {
  auto& trainer = train(GpuTrainer::mixed_tensors());
  trainer.fill(1);
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  trainer.wait_gpus();
  trainer.free_tensor(8);
  EXPECT_EQ(trainer.save_durable(2), SF_INVALID_ARGUMENT);
  EXPECT_NE(std::string(trainer.error().message).find("tensor8"), std::string::npos)
      << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(1), "");
  EXPECT_EQ(trainer.close(), SF_OK);
}

// The simulated driver ends the process when a GPU touches what was freed.
class FailingRestore : public GpuCapture {
 protected:
  // Every call of the driver that a restore makes fails once.
  void restore_with_each_call_failing(std::vector<Tensor> tensors) {
    auto& trainer = train(std::move(tensors));
    trainer.fill(1);
    ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
    std::uint64_t failed_count = 0;
    std::uint64_t nth = 1;
    for (bool is_reached = true; is_reached; nth += kStride) {
      trainer.fill(2);
      trainer.wait_gpus();
      const std::uint64_t calls = simulated_cuda_count().calls;
      simulated_cuda_fail("", nth, CUDA_ERROR_UNKNOWN);
      sf_read_stats stats = {};
      const int code = trainer.restore_newest(false, &stats);
      is_reached = simulated_cuda_count().calls - calls >= nth;
      simulated_cuda_heal();
      if (code == SF_OK) {
        EXPECT_EQ(trainer.find_other(1), "") << "call " << nth;
      } else {
        ++failed_count;
        EXPECT_NE(std::string(trainer.error().message).find("CUDA_ERROR_UNKNOWN"),
                  std::string::npos)
            << "call " << nth << ": " << code << ' ' << trainer.error().message;
      }
    }
    std::cout << nth << " calls, " << failed_count << " failed restores\n";
    EXPECT_GT(failed_count, 10U / kStride);
    EXPECT_EQ(trainer.close(), SF_OK);
  }
};

TEST_F(FailingRestore, comes_back_or_says_why_whichever_call_of_the_driver_fails) {
  restore_with_each_call_failing(GpuTrainer::mixed_tensors());
}

TEST_F(FailingRestore, of_many_small_tensors_comes_back_or_says_why) {
  restore_with_each_call_failing(std::vector<Tensor>(150, {.place = Place::kGpu0, .bytes = 100}));
}

TEST_F(GpuCapture, of_many_small_tensors_is_restored_with_a_launch_for_each_extent) {
  // Two parts, each of 400 KB.
  auto& trainer = train(std::vector<Tensor>(2'000, {.place = Place::kGpu0, .bytes = 400}));
  trainer.fill(1);
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  trainer.fill(2);
  trainer.wait_gpus();
  const auto before = simulated_cuda_count();
  sf_read_stats stats = {};
  ASSERT_EQ(trainer.restore_newest(false, &stats), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.find_other(1), "");
  EXPECT_EQ(simulated_cuda_count().launches, before.launches + 2);
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuCapture, of_many_small_tensors_is_restored_to_a_gpu_without_memory_for_more) {
  auto& trainer = train(std::vector<Tensor>(400, {.place = Place::kGpu0, .bytes = 400}));
  trainer.fill(1);
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  trainer.fill(2);
  trainer.wait_gpus();
  // For the tables, not for an extent; then for neither.
  for (const std::uint64_t left : {std::uint64_t{100'000}, std::uint64_t{0}}) {
    const auto before = simulated_cuda_count();
    simulated_cuda_limit(before.device_bytes + left);
    sf_read_stats stats = {};
    ASSERT_EQ(trainer.restore_newest(false, &stats), SF_OK) << trainer.error().message;
    EXPECT_EQ(trainer.find_other(1), "");
    EXPECT_EQ(simulated_cuda_count().launches, before.launches);
    trainer.fill(2);
    trainer.wait_gpus();
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

// Every call of the driver that a first save makes, and every one of a later save, fails once.
struct FailingSave {
  bool is_first = false;
  const char* lane = "";
};
class FailingCall : public GpuCapture, public ::testing::WithParamInterface<FailingSave> {};

TEST_P(FailingCall, fails_the_save_with_a_reason_and_no_other) {
  const bool is_first_save = GetParam().is_first;
  const std::vector<Tensor> tensors = {
      {.place = Place::kGpu0, .bytes = 60'000, .is_lazy = true},
      {.place = Place::kGpu1, .bytes = 70'000, .is_lazy = true},
      {.place = Place::kHost, .bytes = 8},
      {.place = Place::kGpu0, .bytes = 800, .is_lazy = true, .is_strided = true},
      {.place = Place::kGpu1, .bytes = 500}};
  std::uint64_t failed_count = 0;
  std::uint64_t nth = 1;
  for (bool is_reached = true; is_reached; nth += kStride) {
    ASSERT_LT(nth, 1'000U);
    auto& trainer = train(tensors, {.name = GetParam().lane});
    if (!is_first_save) {
      trainer.fill(1);
      ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
    }
    trainer.fill(2);
    trainer.wait_gpus();
    const std::uint64_t calls = simulated_cuda_count().calls;
    simulated_cuda_fail("", nth, CUDA_ERROR_UNKNOWN);
    std::uint64_t ticket = 0;
    int code = trainer.begin_save(2, SF_CAPTURE_LAZY, &ticket);
    if (code == SF_OK) {
      const int fenced = trainer.fence(ticket);
      const int published = trainer.publish(ticket);
      code = fenced != SF_OK ? fenced : published;
    }
    const std::string reason = trainer.error().message;
    is_reached = simulated_cuda_count().calls - calls >= nth;
    simulated_cuda_heal();
    if (code == SF_OK) {
      // Only what ends something, or was not needed, may fail unseen.
      ASSERT_EQ(trainer.wait_durable(ticket), SF_OK) << "call " << nth;
      EXPECT_EQ(trainer.judge_newest(2), "") << "call " << nth;
    } else {
      ++failed_count;
      EXPECT_NE(reason.find("CUDA_ERROR_UNKNOWN"), std::string::npos)
          << "call " << nth << ": " << code << ' ' << reason;
    }
    trainer.fill(3);
    ASSERT_EQ(trainer.save_durable(3), SF_OK) << "call " << nth << ' ' << trainer.error().message;
    EXPECT_EQ(trainer.judge_newest(3), "") << "call " << nth;
    EXPECT_EQ(trainer.close(), SF_OK);
    trainer_.reset();
  }
  std::cout << nth << " calls, " << failed_count << " failed saves\n";
  EXPECT_GT(failed_count, 10U / kStride);
}

INSTANTIATE_TEST_SUITE_P(OfAFirstSave, FailingCall,
                         ::testing::Values(FailingSave{.is_first = true, .lane = "pinned"},
                                           FailingSave{.is_first = true, .lane = "hbm"},
                                           FailingSave{.is_first = true, .lane = "ipc"}));
INSTANTIATE_TEST_SUITE_P(OfALaterSave, FailingCall,
                         ::testing::Values(FailingSave{.is_first = false, .lane = "pinned"},
                                           FailingSave{.is_first = false, .lane = "hbm"},
                                           FailingSave{.is_first = false, .lane = "ipc"}));

TEST_F(GpuCapture, on_a_broken_context_fails_for_good_and_the_host_goes_on) {
  may_leak_ = true;
  const MayLeak may_leak;
  auto& trainer = train(GpuTrainer::mixed_tensors());
  trainer.fill(1);
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  trainer.wait_gpus();
  simulated_cuda_fail("cuLaunchKernel", 2, CUDA_ERROR_ILLEGAL_ADDRESS, true);
  EXPECT_EQ(trainer.save_durable(2), SF_UNAVAILABLE);
  EXPECT_NE(std::string(trainer.error().message).find("CUDA_ERROR_ILLEGAL_ADDRESS"),
            std::string::npos)
      << trainer.error().message;
  EXPECT_EQ(trainer.save_durable(2), SF_UNAVAILABLE);
  EXPECT_NE(std::string(trainer.error().message).find("not captured in this process any more"),
            std::string::npos)
      << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(1), "");
  EXPECT_EQ(trainer.close(), SF_OK);
}

}  // namespace
}  // namespace stillframe::testing
