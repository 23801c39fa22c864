// F1: the daemon is killed at every step of save, retention and recovery, one after the other.
// After each, a new daemon must find the old checkpoint or the new one, complete, and never a third
// thing.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "tests/oracle/run_oracle.h"
#include "tests/support/judge_run.h"
#include "tests/support/trainer.h"

namespace stillframe::testing {
namespace {

constexpr int kStepCountMax =
    2000;  // Far above what four saves hit; reaching it means the loop never ends.
constexpr std::size_t kSaveCount = 4;

// A thousand daemons start and die here; with a sanitizer in each, every tenth step has to do.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kStride = 10;
#else
constexpr int kStride = 1;
#endif

constexpr std::uint32_t kKeepLast = 1;

struct Outcome {
  bool was_killed = false;
  RunOracle oracle{kKeepLast};
};

// Four saves that keep one checkpoint, against a daemon that dies at the n-th step of its life.
Outcome train_until_killed(const ScratchDirectory& scratch, int n) {
  const std::string socket_path = scratch.path("socket");
  DaemonProcess daemon(socket_path,
                       {{"STILLFRAME_STEP_AT", std::to_string(n)}, {"STILLFRAME_STEP_DO", "kill"}});
  Outcome outcome;
  if (daemon.wait_listening()) {
    Trainer trainer(scratch.path("run"), socket_path, kKeepLast);
    if (trainer.attach() == SF_OK) {
      for (std::int64_t step = 1; step <= std::int64_t{kSaveCount}; ++step) {
        outcome.oracle.began(step);
        if (trainer.save_durable(step) != SF_OK) break;
        outcome.oracle.acknowledged(step);
      }
      (void)trainer.close();
    }
  }
  // Asked to end, it first finishes its retention, in which it may still be killed.
  outcome.was_killed = daemon.stop() != 0;
  if (!outcome.was_killed) {
    EXPECT_EQ(outcome.oracle.acknowledged_count(), kSaveCount) << "step " << n;
  }
  return outcome;
}

void expect_allowed(const ScratchDirectory& scratch, const RunOracle& oracle,
                    RunOracle::Retention retention, const std::string& where) {
  for (const std::string& complaint : judge_recovered(scratch.path("run"), oracle, retention)) {
    ADD_FAILURE() << where << ": " << complaint;
  }
}

// Daemons that die at the first, second, ... step of their recovery, until one lives through it.
int recover_killing_at_every_step(const ScratchDirectory& scratch) {
  const std::string socket_path = scratch.path("socket");
  for (int n = 1; n < kStepCountMax; ++n) {
    DaemonProcess daemon(
        socket_path, {{"STILLFRAME_STEP_AT", std::to_string(n)}, {"STILLFRAME_STEP_DO", "kill"}});
    if (!daemon.wait_listening()) continue;
    Trainer trainer(scratch.path("run"), socket_path, kKeepLast);
    const bool is_attached = trainer.attach() == SF_OK;
    if (daemon.stop() == 0 && is_attached) return n - 1;
  }
  ADD_FAILURE() << "recovery never came to an end";
  return kStepCountMax;
}

TEST(CrashEveryStep, leaves_the_old_or_the_new_checkpoint_and_nothing_else) {
  int killed_count = 0;
  int recovery_count = 0;
  for (int n = 1; n < kStepCountMax; n += kStride) {
    const ScratchDirectory scratch;
    const std::string where = "killed at step " + std::to_string(n);
    Outcome outcome = train_until_killed(scratch, n);
    if (!outcome.was_killed) break;
    ++killed_count;
    recovery_count += recover_killing_at_every_step(scratch);
    expect_allowed(scratch, outcome.oracle, RunOracle::Retention::kMayLag, where);

    const std::string socket_path = scratch.path("socket");
    DaemonProcess daemon(socket_path);
    ASSERT_TRUE(daemon.wait_listening());
    Trainer trainer(scratch.path("run"), socket_path, kKeepLast);
    ASSERT_EQ(trainer.attach(), SF_OK) << where << ": " << trainer.error().message;
    outcome.oracle.began(9);
    outcome.oracle.acknowledged(9);
    EXPECT_EQ(trainer.save_durable(9), SF_OK) << where << ": " << trainer.error().message;
    EXPECT_EQ(trainer.close(), SF_OK);
    // Its retention runs behind DURABLE; the daemon finishes it before it ends.
    EXPECT_EQ(daemon.stop(), 0);
    expect_allowed(scratch, outcome.oracle, RunOracle::Retention::kSettled, where);
    if (HasFatalFailure()) return;
  }
  std::printf("killed at %d steps, and at %d of recovery\n", killed_count, recovery_count);
  EXPECT_GT(killed_count, 60 / kStride) << "the crash points are not compiled in";
}

}  // namespace
}  // namespace stillframe::testing
