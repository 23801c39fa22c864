// A trainer with tensors on GPUs that saves until it is killed, or until its own GPU breaks.
//
//   gpu_crash_trainer RUN SOCKET FIRST_STEP LANE [break]
//
// Says "begin N" before each save and "durable N" behind it. With "break" a kernel breaks its first
// GPU at some moment of the save behind the first durable one: says "broken N" before it, then
// "durable N" or "failed N", closes and ends with 0. Exit status 1: something else failed.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>

#include "tests/support/gpu_trainer.h"

namespace {

using stillframe::testing::GpuTrainer;

void say(const char* word, std::int64_t step) {
  std::printf("%s %lld\n", word, static_cast<long long>(step));
  std::fflush(stdout);
}

int fail(GpuTrainer& trainer, const char* doing) {
  std::fprintf(stderr, "gpu_crash_trainer: %s: %s\n", doing, trainer.error().message);
  return 1;
}

// What a training does whose kernel has failed: no more than to end.
int end_broken(GpuTrainer& trainer, std::int64_t step) {
  std::uint64_t ticket = 0;
  if (trainer.begin_save(step, SF_CAPTURE_LAZY, &ticket) != SF_OK) return fail(trainer, "save");
  // Mostly soon: a small state is captured within a few milliseconds.
  std::random_device random;
  std::this_thread::sleep_for(std::chrono::microseconds(random() % 16'000 >> random() % 7));
  say("broken", step);
  trainer.break_gpu();
  const bool is_durable = trainer.publish(ticket) == SF_OK && trainer.wait_durable(ticket) == SF_OK;
  if (!is_durable) std::fprintf(stderr, "gpu_crash_trainer: %s\n", trainer.error().message);
  say(is_durable ? "durable" : "failed", step);
  if (trainer.begin_save(step + 1, SF_CAPTURE_LAZY, &ticket) == SF_OK) {
    std::fprintf(stderr, "gpu_crash_trainer: a save began on a broken GPU\n");
    return 1;
  }
  return trainer.close() == SF_OK ? 0 : fail(trainer, "close");
}

int run(const char* run_path, const char* socket_path, std::int64_t step, const char* lane,
        bool breaks) {
  GpuTrainer trainer(run_path, socket_path, GpuTrainer::mixed_tensors());
  if (trainer.attach({.name = lane}) != SF_OK) return fail(trainer, "attach");
  trainer.fill(step);
  for (;; ++step) {
    say("begin", step);
    std::uint64_t ticket = 0;
    if (trainer.begin_save(step, SF_CAPTURE_LAZY, &ticket) != SF_OK) return fail(trainer, "save");
    trainer.fill(step + 1, GpuTrainer::Which::kEarly);
    if (trainer.fence(ticket) != SF_OK) return fail(trainer, "fence");
    trainer.fill(step + 1, GpuTrainer::Which::kLazy);
    if (trainer.publish(ticket) != SF_OK) return fail(trainer, "publish");
    if (trainer.wait_durable(ticket) != SF_OK) return fail(trainer, "wait");
    trainer.wait_gpus();
    say("durable", step);
    if (breaks) return end_broken(trainer, step + 1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool breaks = argc == 6 && std::string(argv[5]) == "break";
  if (argc != 5 && !breaks) return 2;
  const int status = run(argv[1], argv[2], std::atoll(argv[3]), argv[4], breaks);
  // What a broken GPU may still use is never freed: nothing for a sanitizer to find.
  std::_Exit(status);
}
