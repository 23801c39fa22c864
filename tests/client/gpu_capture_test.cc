// Tensors of GPUs through the public C ABI, a real daemon and the simulated driver.
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "kernels/gpu_image.h"
#include "tests/format/seed.h"
#include "tests/simulated_cuda/control.h"
#include "tests/support/gpu_trainer.h"
#include "tests/support/trainer.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/lsan_interface.h>
#endif

namespace stillframe::client {
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

using Tensor = testing::GpuTrainer::Tensor;
using Place = testing::GpuTrainer::Place;
using Which = testing::GpuTrainer::Which;

// Of the calls that fail; a sanitizer's build takes a part of those that the plain one takes all
// of.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::uint64_t kStride = 7;
#else
constexpr std::uint64_t kStride = 1;
#endif

class GpuCapture : public ::testing::Test {
 protected:
  void SetUp() override {
    if (kernels::gpu_image().empty()) GTEST_SKIP() << "built without nvcc";
    before_ = simulated_cuda_count();
    daemon_.emplace(directory_.path("socket"));
    ASSERT_TRUE(daemon_->wait_listening());
  }
  void TearDown() override {
    simulated_cuda_heal();
    simulated_cuda_limit(std::uint64_t{4} << 30);
    trainer_.reset();
    // Whatever happened, the GPUs are as they were.
    if (!may_leak_) {
      const auto after = simulated_cuda_count();
      EXPECT_EQ(after.device_bytes, before_.device_bytes);
      EXPECT_EQ(after.host_bytes, before_.host_bytes);
      EXPECT_EQ(after.handles, before_.handles);
    }
  }

  testing::GpuTrainer& train(std::vector<Tensor> tensors, std::uint64_t window_bytes = 0) {
    trainer_.emplace(directory_.path("run"), directory_.path("socket"), std::move(tensors));
    EXPECT_EQ(trainer_->attach(window_bytes), SF_OK) << trainer_->error().message;
    return *trainer_;
  }
  // A lazy save of what was filled for `step`, with the next step's work enqueued as early as it
  // may.
  static void save_beside_training(testing::GpuTrainer& trainer, std::int64_t step) {
    std::uint64_t ticket = 0;
    ASSERT_EQ(trainer.begin_save(step, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
    // The forward pass changes buffers at once, the optimizer the rest behind the fence.
    trainer.fill(step + 1, Which::kEarly);
    ASSERT_EQ(trainer.fence(ticket), SF_OK) << trainer.error().message;
    trainer.fill(step + 1, Which::kLazy);
    ASSERT_EQ(trainer.publish(ticket), SF_OK) << trainer.error().message;
    ASSERT_EQ(trainer.wait_durable(ticket), SF_OK) << trainer.error().message;
    ASSERT_EQ(trainer.judge_newest(step), "") << "step " << step;
  }
  // Parameters and moments on both GPUs, buffers, counters of the host: one of each kind.
  static std::vector<Tensor> mixed() {
    return {{.place = Place::kGpu0, .bytes = 1'500'000, .is_lazy = true},
            {.place = Place::kHost, .bytes = 4},
            {.place = Place::kGpu0, .bytes = 333, .misalignment = 3},
            {.place = Place::kGpu1, .bytes = 700'001, .is_lazy = true, .misalignment = 1},
            {.place = Place::kGpu0, .bytes = 80'000, .is_lazy = true, .is_strided = true},
            {.place = Place::kHost, .bytes = 1'200'000, .is_lazy = true},
            {.place = Place::kGpu1, .bytes = 0},
            {.place = Place::kHost, .bytes = 900'000},
            {.place = Place::kGpu1, .bytes = 1'300'000, .is_lazy = true},
            {.place = Place::kGpu1, .bytes = 64}};
  }

  simulated_cuda_counts before_ = {};
  bool may_leak_ = false;
  testing::ScratchDirectory directory_;
  std::optional<testing::DaemonProcess> daemon_;
  std::optional<testing::GpuTrainer> trainer_;
};

TEST_F(GpuCapture, of_tensors_on_two_gpus_and_the_host_is_restored_bit_for_bit) {
  auto& trainer = train(mixed());
  for (const std::int64_t step : {1, 2, 3}) {
    trainer.fill(step);
    ASSERT_EQ(trainer.save_durable(step), SF_OK) << trainer.error().message;
    EXPECT_EQ(trainer.judge_newest(step), "");
  }
  EXPECT_NE(trainer.describe().find("\"lane\": \"pinned\""), std::string::npos)
      << trainer.describe();
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuCapture, lazily_holds_what_the_streams_had_done_and_nothing_later) {
  auto& trainer = train(mixed());
  trainer.fill(0);
  for (std::int64_t step = 0; step < 6; ++step) {
    ASSERT_NO_FATAL_FAILURE(save_beside_training(trainer, step));
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

// Nothing is fetched here, which would have the save wait for the GPU.
TEST_F(GpuCapture, takes_its_place_in_a_stream_that_is_far_behind) {
  auto& trainer = train({{.place = Place::kGpu0, .bytes = 1'500'000, .is_lazy = true},
                         {.place = Place::kGpu0, .bytes = 200'000},
                         {.place = Place::kGpu0, .bytes = 900'000, .is_lazy = true},
                         {.place = Place::kGpu0, .bytes = 30}});
  for (std::int64_t step = 0; step < 6; ++step) {
    for (std::int64_t other = 100; other < 110; ++other) trainer.fill(other);
    trainer.fill(step);
    ASSERT_NO_FATAL_FAILURE(save_beside_training(trainer, step));
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuCapture, of_any_layout_is_restored_bit_for_bit) {
  auto random = format::seeded_generator();
  using format::pick;
  std::vector<Tensor> tensors;
  for (int i = 0; i < 60; ++i) {
    const Place place = std::array{Place::kHost, Place::kGpu0, Place::kGpu1}[pick(random, 3)];
    const std::uint64_t size_class = pick(random, 4);
    const std::uint64_t bytes = size_class == 0   ? pick(random, 20)
                                : size_class == 1 ? pick(random, 5'000)
                                : size_class == 2 ? pick(random, 100'000)
                                                  : pick(random, 400'000);
    const bool is_strided = pick(random, 6) == 0 && bytes >= 16;
    tensors.push_back({.place = place,
                       .bytes = is_strided ? bytes / 8 * 8 : bytes,
                       .is_lazy = pick(random, 2) == 0,
                       .is_strided = is_strided,
                       .misalignment = pick(random, 17)});
  }
  auto& trainer = train(std::move(tensors));
  trainer.fill(5);
  ASSERT_EQ(trainer.save_durable(5), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(5), "");
  ASSERT_NO_FATAL_FAILURE(save_beside_training(trainer, 5));
  EXPECT_EQ(trainer.close(), SF_OK);
}

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
TEST_F(GpuCapture, of_many_chunks_is_restored_bit_for_bit) {
  for (const std::uint64_t window_bytes : {std::uint64_t{2} << 20, std::uint64_t{1}}) {
    auto& trainer = train({{.place = Place::kGpu0, .bytes = 5'000'000, .is_lazy = true},
                           {.place = Place::kHost, .bytes = 1'100'000, .is_lazy = true},
                           {.place = Place::kGpu1, .bytes = 300'000, .is_lazy = true},
                           {.place = Place::kGpu0, .bytes = 4'000'000, .is_lazy = true}},
                          window_bytes);
    trainer.fill(0);
    for (std::int64_t step = 0; step < 3; ++step) {
      ASSERT_NO_FATAL_FAILURE(save_beside_training(trainer, step));
    }
    EXPECT_EQ(trainer.close(), SF_OK);
  }
}

TEST_F(GpuCapture, without_memory_for_a_window_writes_to_the_slot_itself) {
  auto& trainer = train(mixed());
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
  std::vector<Tensor> tensors = mixed();
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

TEST_F(GpuCapture, of_memory_that_was_freed_is_refused_with_the_tensors_name) {
  auto& trainer = train(mixed());
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

TEST_F(GpuCapture, that_is_voided_leaves_the_gpus_idle_and_the_next_save_works) {
  auto& trainer = train(mixed());
  trainer.fill(1);
  std::uint64_t ticket = 0;
  ASSERT_EQ(trainer.begin_save(1, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
  sf_error error{};
  ASSERT_EQ(sf_capture_void(trainer.session(), ticket, 0, "no longer wanted", &error), SF_OK);
  EXPECT_EQ(trainer.wait_durable(ticket), SF_CANCELLED);
  trainer.fill(2);
  ASSERT_EQ(trainer.save_durable(2), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(2), "");
  EXPECT_EQ(trainer.close(), SF_OK);
}

// The simulated driver ends the process when a GPU touches what was freed.
TEST_F(GpuCapture, that_is_voided_reads_no_memory_any_more) {
  for (int round = 0; round < 8; ++round) {
    auto& trainer = train({{.place = Place::kGpu0, .bytes = 1'500'000, .is_lazy = true},
                           {.place = Place::kGpu1, .bytes = 1'500'000, .is_lazy = true}});
    trainer.fill(round);
    trainer.wait_gpus();
    std::uint64_t ticket = 0;
    ASSERT_EQ(trainer.begin_save(round, SF_CAPTURE_LAZY, &ticket), SF_OK)
        << trainer.error().message;
    std::this_thread::sleep_for(std::chrono::milliseconds(round));
    sf_error error{};
    ASSERT_EQ(sf_capture_void(trainer.session(), ticket, 0, "no longer wanted", &error), SF_OK);
    trainer.free_tensor(0);
    trainer.free_tensor(1);
    EXPECT_EQ(trainer.close(), SF_OK);
  }
}

TEST_F(GpuCapture, outlives_the_daemon) {
  auto& trainer = train(mixed());
  trainer.fill(1);
  std::uint64_t ticket = 0;
  ASSERT_EQ(trainer.begin_save(1, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
  daemon_->kill_now();
  EXPECT_EQ(trainer.publish(ticket), SF_UNAVAILABLE);
  daemon_.emplace(directory_.path("socket"));
  ASSERT_TRUE(daemon_->wait_listening());
  trainer.fill(2);
  ASSERT_EQ(trainer.save_durable(2), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(2), "");
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuCapture, comes_back_to_the_gpus_from_memory_and_from_the_drive) {
  auto& trainer = train(mixed());
  trainer.fill(1);
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  for (const bool uses_memory : {true, false}) {
    // Work that is still on its way to the tensors when the restore begins.
    trainer.fill(2);
    sf_read_stats stats = {};
    ASSERT_EQ(trainer.restore_newest(uses_memory, &stats), SF_OK) << trainer.error().message;
    EXPECT_EQ(stats.from_memory, uses_memory ? 1 : 0);
    trainer.wait_gpus();
    EXPECT_EQ(trainer.find_other(1), "");
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuCapture, damaged_on_the_drive_never_reaches_a_gpu) {
  auto& trainer =
      train({{.place = Place::kGpu0, .bytes = 2'000'000}, {.place = Place::kGpu1, .bytes = 1'000}});
  trainer.fill(1);
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  const std::string file = directory_.path("run/00000001-step-1/model.safetensors");
  std::FILE* const opened = std::fopen(file.c_str(), "r+b");
  ASSERT_NE(opened, nullptr);
  ASSERT_EQ(std::fseek(opened, 1'500'000, SEEK_SET), 0);
  const int before = std::fgetc(opened);
  ASSERT_EQ(std::fseek(opened, 1'500'000, SEEK_SET), 0);
  std::fputc(before ^ 1, opened);
  std::fclose(opened);
  trainer.fill(2);
  trainer.wait_gpus();
  sf_read_stats stats = {};
  EXPECT_EQ(trainer.restore_newest(false, &stats), SF_DATA_LOSS) << trainer.error().message;
  trainer.wait_gpus();
  const std::vector<std::uint8_t> held = trainer.read_gpu(0);
  // The extent that is damaged begins behind 1 MiB of the file, 4 KiB of which are the header.
  const std::size_t damaged_from = (std::size_t{1} << 20) - 4096;
  for (std::size_t i = damaged_from; i < held.size(); ++i) {
    ASSERT_EQ(held[i], testing::GpuTrainer::byte_at(2, 0, i)) << i;
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuCapture, comes_back_or_says_why_whichever_call_of_the_driver_fails) {
  auto& trainer = train(mixed());
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
      EXPECT_NE(std::string(trainer.error().message).find("CUDA_ERROR_UNKNOWN"), std::string::npos)
          << "call " << nth << ": " << code << ' ' << trainer.error().message;
    }
  }
  std::cout << nth << " calls, " << failed_count << " failed restores\n";
  EXPECT_GT(failed_count, 10U / kStride);
  EXPECT_EQ(trainer.close(), SF_OK);
}

// Every call of the driver that a first save makes, and every one of a later save, fails once.
class FailingCall : public GpuCapture, public ::testing::WithParamInterface<bool> {};

TEST_P(FailingCall, fails_the_save_with_a_reason_and_no_other) {
  const bool is_first_save = GetParam();
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
    auto& trainer = train(tensors);
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

INSTANTIATE_TEST_SUITE_P(OfAFirstSave, FailingCall, ::testing::Values(true));
INSTANTIATE_TEST_SUITE_P(OfALaterSave, FailingCall, ::testing::Values(false));

TEST_F(GpuCapture, on_a_broken_context_fails_for_good_and_the_host_goes_on) {
  may_leak_ = true;
  const MayLeak may_leak;
  auto& trainer = train(mixed());
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
}  // namespace stillframe::client
