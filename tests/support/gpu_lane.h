#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <climits>
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/gpu_image.h"
#include "tests/support/gpu_trainer.h"
#include "tests/support/trainer.h"

namespace stillframe::testing {

// Kernels run on the CPU; a sanitizer makes them ten times as slow once more.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kIsSanitized = true;
#else
inline constexpr bool kIsSanitized = false;
#endif

// A daemon of its own and a trainer with tensors on GPUs, whatever driver there is.
class GpuLane : public ::testing::Test {
 protected:
  using Tensor = GpuTrainer::Tensor;
  using Place = GpuTrainer::Place;
  using Which = GpuTrainer::Which;

  using Lane = GpuTrainer::Lane;

  void SetUp() override {
    if (kernels::gpu_image().empty()) GTEST_SKIP() << "built without nvcc";
    start_daemon();
  }

  void start_daemon(DaemonProcess::Variables variables = {}) {
    variables.emplace("LD_LIBRARY_PATH", driver_folder());
    daemon_.emplace(directory_.path("socket"), variables);
    ASSERT_TRUE(daemon_->wait_listening());
  }

  GpuTrainer& train(std::vector<Tensor> tensors, const Lane& lane = {}) {
    trainer_.emplace(directory_.path("run"), directory_.path("socket"), std::move(tensors));
    EXPECT_EQ(trainer_->attach(lane), SF_OK) << trainer_->error().message;
    return *trainer_;
  }
  // Where this program's driver lies, for programs that are to have the same one.
  static std::string driver_folder() {
    char folder[PATH_MAX] = {};
    void* const driver = ::dlopen("libcuda.so.1", RTLD_LAZY);
    check(driver != nullptr && ::dlinfo(driver, RTLD_DI_ORIGIN, folder) == 0, "there is a driver");
    return folder;
  }
  // Of the daemon's workers, any one; 0: there is none.
  pid_t worker_pid() {
    char* json = nullptr;
    if (sf_daemon_status(directory_.path("socket").c_str(), &json, nullptr) != SF_OK) return 0;
    const std::string text = json;
    sf_free(json);
    const std::size_t at = text.find("\"GPU-");
    return at == std::string::npos ? 0 : std::atoi(text.c_str() + text.find(':', at) + 1);
  }
  // A lazy save of what was filled for `step`, with the next step's work enqueued as early as it
  // may.
  static void save_beside_training(GpuTrainer& trainer, std::int64_t step) {
    std::uint64_t ticket = 0;
    ASSERT_EQ(trainer.begin_save(step, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
    end_beside_training(trainer, step, ticket);
  }
  static void end_beside_training(GpuTrainer& trainer, std::int64_t step, std::uint64_t ticket) {
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
