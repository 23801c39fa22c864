// A trainer with tensors on GPUs that saves until it is killed.
//
//   gpu_crash_trainer RUN SOCKET FIRST_STEP LANE
//
// Says "begin N" before each save and "durable N" behind it.
#include <cstdio>
#include <cstdlib>

#include "tests/support/gpu_trainer.h"

namespace {

using stillframe::testing::GpuTrainer;

int run(const char* run_path, const char* socket_path, std::int64_t step, const char* lane) {
  GpuTrainer trainer(run_path, socket_path, GpuTrainer::mixed_tensors());
  const auto fail = [&trainer](const char* doing) {
    std::fprintf(stderr, "gpu_crash_trainer: %s: %s\n", doing, trainer.error().message);
    return 1;
  };
  if (trainer.attach({.name = lane}) != SF_OK) return fail("attach");
  trainer.fill(step);
  for (;; ++step) {
    std::printf("begin %lld\n", static_cast<long long>(step));
    std::fflush(stdout);
    std::uint64_t ticket = 0;
    if (trainer.begin_save(step, SF_CAPTURE_LAZY, &ticket) != SF_OK) return fail("save");
    trainer.fill(step + 1, GpuTrainer::Which::kEarly);
    if (trainer.fence(ticket) != SF_OK) return fail("fence");
    trainer.fill(step + 1, GpuTrainer::Which::kLazy);
    if (trainer.publish(ticket) != SF_OK) return fail("publish");
    if (trainer.wait_durable(ticket) != SF_OK) return fail("wait");
    trainer.wait_gpus();
    std::printf("durable %lld\n", static_cast<long long>(step));
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return argc == 5 ? run(argv[1], argv[2], std::atoll(argv[3]), argv[4]) : 2;
}
