#pragma once

#include <gtest/gtest.h>

#include <optional>
#include <utility>
#include <vector>

#include "kernels/gpu_image.h"
#include "tests/support/gpu_trainer.h"
#include "tests/support/trainer.h"

namespace stillframe::testing {

// A daemon of its own and a trainer with tensors on GPUs, whatever driver there is.
class GpuLane : public ::testing::Test {
 protected:
  using Tensor = GpuTrainer::Tensor;
  using Place = GpuTrainer::Place;
  using Which = GpuTrainer::Which;

  void SetUp() override {
    if (kernels::gpu_image().empty()) GTEST_SKIP() << "built without nvcc";
    daemon_.emplace(directory_.path("socket"));
    ASSERT_TRUE(daemon_->wait_listening());
  }

  GpuTrainer& train(std::vector<Tensor> tensors, std::uint64_t window_bytes = 0) {
    trainer_.emplace(directory_.path("run"), directory_.path("socket"), std::move(tensors));
    EXPECT_EQ(trainer_->attach(window_bytes), SF_OK) << trainer_->error().message;
    return *trainer_;
  }
  // A lazy save of what was filled for `step`, with the next step's work enqueued as early as it
  // may.
  static void save_beside_training(GpuTrainer& trainer, std::int64_t step) {
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
  ScratchDirectory directory_;
  std::optional<DaemonProcess> daemon_;
  std::optional<GpuTrainer> trainer_;
};

}  // namespace stillframe::testing
