// What goes wrong with a GPU's worker: no driver, no memory, calls that fail there. On the
// simulated driver, which the worker is told of by its environment.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "tests/simulated_cuda/control.h"
#include "tests/support/gpu_lane.h"

namespace stillframe::testing {
namespace {

constexpr int kStride = kIsSanitized ? 7 : 1;

class FailingWorker : public GpuLane, public ::testing::WithParamInterface<const char*> {
 protected:
  void SetUp() override {
    if (kernels::gpu_image().empty()) GTEST_SKIP() << "built without nvcc";
  }
  // Until CUDA_MPS_PIPE_DIRECTORY is unset.
  void pretend_mps() {
    const std::string folder = directory_.path("mps");
    ASSERT_EQ(::mkdir(folder.c_str(), 0700), 0);
    std::FILE* const control = std::fopen((folder + "/control").c_str(), "w");
    ASSERT_NE(control, nullptr);
    std::fclose(control);
    ASSERT_EQ(::setenv("CUDA_MPS_PIPE_DIRECTORY", folder.c_str(), 1), 0);
  }
  // A save that works in lane pinned, and what is said about that.
  std::string reason_for_pinned(std::vector<Tensor> tensors = GpuTrainer::mixed_tensors(),
                                std::uint64_t ring_bytes = 0) {
    auto& trainer = train(std::move(tensors), {.name = GetParam(), .ring_bytes = ring_bytes});
    trainer.fill(1);
    EXPECT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
    EXPECT_EQ(trainer.judge_newest(1), "");
    const std::string said = trainer.describe();
    EXPECT_NE(said.find("\"lane\": \"pinned\""), std::string::npos) << said;
    EXPECT_EQ(trainer.close(), SF_OK);
    return said;
  }
};

TEST_P(FailingWorker, without_a_driver_leaves_lane_pinned) {
  start_daemon({{"LD_LIBRARY_PATH", "/nonexistent"}});
  EXPECT_NE(reason_for_pinned().find("no NVIDIA driver"), std::string::npos);
}

TEST_P(FailingWorker, that_does_not_see_the_gpu_leaves_lane_pinned) {
  start_daemon({{"STILLFRAME_SIMULATED_GPUS", "1"}});
  const std::string said = reason_for_pinned();
  EXPECT_NE(said.find("not on GPU 1"), std::string::npos) << said;
  EXPECT_EQ(said.find("not on GPU 0"), std::string::npos) << said;
}

TEST_P(FailingWorker, without_memory_for_a_ring_leaves_lane_pinned) {
  start_daemon({{"STILLFRAME_SIMULATED_BYTES", "3000000"}});
  const std::string said = reason_for_pinned();
  EXPECT_NE(said.find("half of the 3000000 that are free"), std::string::npos) << said;
}

TEST_P(FailingWorker, is_not_asked_for_a_ring_of_no_bytes) {
  start_daemon();
  EXPECT_NE(reason_for_pinned(GpuTrainer::mixed_tensors(), 1).find("a ring of no bytes"),
            std::string::npos);
  EXPECT_EQ(worker_pid(), 0);
}

TEST_P(FailingWorker, is_not_started_under_mps) {
  start_daemon();
  pretend_mps();
  const std::string said = reason_for_pinned();
  (void)::unsetenv("CUDA_MPS_PIPE_DIRECTORY");
  EXPECT_NE(said.find("MPS is in use"), std::string::npos) << said;
  EXPECT_EQ(worker_pid(), 0);
}

TEST_P(FailingWorker, is_asked_for_again_after_a_while) {
  start_daemon();
  auto& trainer = train(GpuTrainer::mixed_tensors(), {.name = GetParam()});
  pretend_mps();
  trainer.fill(1);
  EXPECT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  (void)::unsetenv("CUDA_MPS_PIPE_DIRECTORY");
  const std::string in_use = std::string("\"lane\": \"") + GetParam();
  EXPECT_EQ(trainer.describe().find(in_use), std::string::npos) << trainer.describe();
  for (std::int64_t step = 2; step < 40; ++step) {
    trainer.fill(step);
    ASSERT_EQ(trainer.save_durable(step), SF_OK) << trainer.error().message;
    ASSERT_EQ(trainer.judge_newest(step), "");
    if (trainer.describe().find(in_use) != std::string::npos) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
  }
  EXPECT_NE(trainer.describe().find(in_use), std::string::npos) << trainer.describe();
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_P(FailingWorker, that_dies_three_times_within_a_minute_is_given_up) {
  start_daemon({{"STILLFRAME_SIMULATED_FAULT", "cuMemcpyDtoHAsync:1:700:1"}});
  auto& trainer = train({{.place = Place::kGpu0, .bytes = 500'000}}, {.name = GetParam()});
  for (std::int64_t step = 1; step <= 3; ++step) {
    trainer.fill(step);
    EXPECT_EQ(trainer.save_durable(step), SF_UNAVAILABLE);
    EXPECT_NE(std::string(trainer.error().message).find("the GPU worker was lost"),
              std::string::npos)
        << trainer.error().message;
  }
  trainer.fill(4);
  ASSERT_EQ(trainer.save_durable(4), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(4), "");
  EXPECT_NE(trainer.describe().find("died 3 times within a minute"), std::string::npos)
      << trainer.describe();
  EXPECT_EQ(trainer.close(), SF_OK);
}

// A stream for each client, and in lane ipc another.
TEST_P(FailingWorker, that_has_nothing_to_spare_for_a_second_trainer_serves_the_first) {
  const bool is_hbm = std::string(GetParam()) == "hbm";
  start_daemon({{"STILLFRAME_SIMULATED_FAULT",
                 std::string("cuStreamCreateWithPriority:") + (is_hbm ? "2" : "3") + ":2:0"}});
  const std::vector<Tensor> tensors = {{.place = Place::kGpu0, .bytes = 1'500'000}};
  auto& first = train(tensors, {.name = GetParam()});
  GpuTrainer second(directory_.path("other"), directory_.path("socket"), tensors);
  ASSERT_EQ(second.attach({.name = GetParam()}), SF_OK);
  const std::string in_use = std::string("\"lane\": \"") + GetParam();
  for (std::int64_t step = 1; step < 4; ++step) {
    for (GpuTrainer* const trainer : {&first, &second}) {
      trainer->fill(step);
      ASSERT_EQ(trainer->save_durable(step), SF_OK) << trainer->error().message;
      EXPECT_EQ(trainer->judge_newest(step), "");
    }
    EXPECT_NE(first.describe().find(in_use), std::string::npos) << first.describe();
  }
  EXPECT_NE(second.describe().find("CUDA_ERROR_OUT_OF_MEMORY"), std::string::npos)
      << second.describe();
  EXPECT_EQ(second.close(), SF_OK);
  EXPECT_EQ(first.close(), SF_OK);
}

// Of the calls that a worker makes for its first save, each fails once; in a sanitizer's build a
// part of them.
TEST_P(FailingWorker, fails_a_save_or_none_whichever_of_its_calls_does) {
  constexpr int kCallsMax = 70;  // It makes some 40 to 60.
  int failed_count = 0;
  int pinned_count = 0;
  for (int nth = 1; nth <= kCallsMax; nth += kStride) {
    start_daemon({{"STILLFRAME_SIMULATED_FAULT", "any:" + std::to_string(nth) + ":999:0"}});
    auto& trainer = train({{.place = Place::kGpu0, .bytes = 1'500'000}}, {.name = GetParam()});
    trainer.fill(1);
    if (trainer.save_durable(1) == SF_OK) {
      EXPECT_EQ(trainer.judge_newest(1), "") << "call " << nth;
    } else {
      ++failed_count;
      EXPECT_NE(std::string(trainer.error().message).find("the GPU worker was lost"),
                std::string::npos)
          << "call " << nth << ": " << trainer.error().message;
      start_daemon();  // Whose worker's calls do not fail.
      trainer.fill(2);
      ASSERT_EQ(trainer.save_durable(2), SF_OK) << "call " << nth << trainer.error().message;
      EXPECT_EQ(trainer.judge_newest(2), "") << "call " << nth;
    }
    if (trainer.describe().find("\"lane\": \"pinned\"") != std::string::npos) ++pinned_count;
    EXPECT_EQ(trainer.close(), SF_OK);
    trainer_.reset();
  }
  std::cout << failed_count << " saves failed, " << pinned_count << " in lane pinned\n";
  EXPECT_GT(failed_count + pinned_count, 10 / kStride);
}

class LyingDriver : public GpuLane {
  void SetUp() override {
    if (kernels::gpu_image().empty()) GTEST_SKIP() << "built without nvcc";
  }
};

TEST_F(LyingDriver, that_gives_a_worker_zeros_fails_the_save) {
  start_daemon({{"STILLFRAME_SIMULATED_ZEROS", "1"}});
  auto& trainer =
      train({{.place = Place::kGpu0, .bytes = 1'500'000, .is_lazy = true}}, {.name = "ipc"});
  for (std::int64_t step = 1; step < 4; ++step) {
    trainer.fill(step);
    EXPECT_EQ(trainer.save_durable(step), SF_DATA_LOSS) << trainer.error().message;
    EXPECT_NE(std::string(trainer.error().message).find("other bytes than the training has"),
              std::string::npos)
        << trainer.error().message;
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

class SlowDriver : public LyingDriver {};

// By the time that the worker copies a place of the ring, the trainer could have packed it anew.
TEST_F(SlowDriver, that_drains_late_gets_each_place_as_it_was_packed) {
  start_daemon({{"STILLFRAME_SIMULATED_COPY_MS", "20"}});
  auto& trainer = train({{.place = Place::kGpu0, .bytes = 5'000'000, .is_lazy = true},
                         {.place = Place::kGpu0, .bytes = 1'100'003, .is_lazy = true},
                         {.place = Place::kGpu0, .bytes = 4'000'000, .is_lazy = true}},
                        {.name = "hbm", .ring_bytes = 2U << 20U});
  for (std::int64_t step = 1; step < 3; ++step) {
    trainer.fill(step);
    ASSERT_EQ(trainer.save_durable(step), SF_OK) << trainer.error().message;
    EXPECT_EQ(trainer.judge_newest(step), "");
  }
  const std::string said = trainer.describe();
  EXPECT_NE(said.find("\"lane\": \"hbm\""), std::string::npos) << said;
  EXPECT_EQ(trainer.close(), SF_OK);
}

class PacedWorker : public FailingWorker {};

// It leaves the copy engine to others for most of the time, but not when the training stands still.
TEST_P(PacedWorker, does_not_pause_while_the_trainer_waits) {
  start_daemon({{"STILLFRAME_GPU_DRAIN_SHARE", "0.01"}, {"STILLFRAME_SIMULATED_COPY_MS", "20"}});
  // Three extents, each a chunk of its own: after each of the first two it pauses for two seconds.
  constexpr std::chrono::milliseconds kPauses{3'900};
  auto& trainer = train({{.place = Place::kGpu0, .bytes = 2'500'000, .is_lazy = true}},
                        {.name = GetParam(), .ring_bytes = 2U << 20U});
  trainer.fill(0);
  ASSERT_EQ(trainer.save_durable(0), SF_OK) << trainer.error().message;  // Brings the worker up.
  using Clock = std::chrono::steady_clock;
  const Clock::time_point before_eager = Clock::now();
  ASSERT_EQ(trainer.save_durable(0), SF_OK) << trainer.error().message;
  EXPECT_LT(Clock::now() - before_eager, kPauses);
  for (const int helps : {0, 1}) {
    std::uint64_t ticket = 0;
    const Clock::time_point begin = Clock::now();
    ASSERT_EQ(trainer.begin_save(0, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
    ASSERT_EQ(sf_capture_wait(trainer.session(), ticket, 10'000, helps, nullptr), SF_OK);
    if (helps != 0) {
      EXPECT_LT(Clock::now() - begin, kPauses);
    } else {
      EXPECT_GE(Clock::now() - begin, kPauses);
    }
    ASSERT_EQ(sf_capture_publish(trainer.session(), ticket, nullptr), SF_OK);
    ASSERT_EQ(trainer.wait_durable(ticket), SF_OK) << trainer.error().message;
  }
  EXPECT_NE(trainer.describe().find(std::string("\"lane\": \"") + GetParam()), std::string::npos)
      << trainer.describe();
  EXPECT_EQ(trainer.close(), SF_OK);
}

INSTANTIATE_TEST_SUITE_P(Hbm, PacedWorker, ::testing::Values("hbm"));
INSTANTIATE_TEST_SUITE_P(Ipc, PacedWorker, ::testing::Values("ipc"));
INSTANTIATE_TEST_SUITE_P(Hbm, FailingWorker, ::testing::Values("hbm"));
INSTANTIATE_TEST_SUITE_P(Ipc, FailingWorker, ::testing::Values("ipc"));

}  // namespace
}  // namespace stillframe::testing
