// F1: the daemon is killed at every step of saves, retention, pins, a removal and recovery, one
// after the other. After each, a new daemon must find the old checkpoint or the new one, complete,
// and never a third thing.
#include <gtest/gtest.h>

#include <cstdint>
#include <fstream>
#include <set>
#include <string>

#include "tests/oracle/run_oracle.h"
#include "tests/support/judge_run.h"
#include "tests/support/run_history.h"
#include "tests/support/trainer.h"

namespace stillframe::testing {
namespace {

constexpr int kStepCountMax =
    2000;  // Far above what a history hits; reaching it means the loop never ends.

// Two thousand daemons start and die here; with a sanitizer in each, some of the steps have to do.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kStride = 25;
#else
constexpr int kStride = 1;
#endif

// The steps of which a history has to meet each. The others are those of a full disk and of copies.
constexpr const char* kNames[] = {
    "create_run: make directory",
    "create_run: name run id",
    "C1 admit",
    "C2 make temporary directory",
    "C3 create part",
    "C3 allocate part",
    "C3 move part from spool",
    "C3 allocate recycled part",
    "C4 write",
    "C5 compare headers",
    "C6 cut part to its length",
    "C6 fsync file",
    "C6 write sums and state",
    "C7 write manifest",
    "C7 fsync manifest",
    "C8 fsync temporary directory",
    "C8 fsync spool directory",
    "C9 rename to the final name",
    "C10 fsync run directory",
    "C10 fsync private directory",
    "C12 record sequence floor",
    "C12 rename manifest to dead",
    "C12 sync victim",
    "C13 move part to spool",
    "C13 unlink file of victim",
    "C13 unlink dead manifest",
    "C13 remove victim",
    "tag: write",
    "tag: unlink",
};

struct Outcome {
  bool was_killed = false;
  RunOracle oracle{kHistoryKeepLast};
};

// A history against a daemon that dies at the n-th step of its life.
Outcome live_until_killed(const ScratchDirectory& scratch, int n) {
  const std::string socket_path = scratch.path("socket");
  DaemonProcess daemon(socket_path, {{"STILLFRAME_STEP_AT", std::to_string(n)},
                                     {"STILLFRAME_STEP_DO", "kill"},
                                     {"STILLFRAME_STEP_TRACE", scratch.path("steps")}});
  Outcome outcome;
  std::string failure;
  if (daemon.wait_listening()) {
    const auto tell = [&outcome](std::string_view word, std::int64_t step) {
      EXPECT_TRUE(outcome.oracle.note(word, step)) << word;
    };
    failure = live_history(scratch.path("run"), socket_path, tell);
  }
  // Asked to end, it first finishes its retention, in which it may still be killed.
  outcome.was_killed = daemon.stop() != 0;
  if (!outcome.was_killed) {
    EXPECT_EQ(outcome.oracle.acknowledged_count(), kHistorySaveCount) << failure;
  }
  return outcome;
}

void expect_every_name(const std::string& trace_path) {
  std::set<std::string> names;
  std::ifstream lines(trace_path);
  for (std::string line; std::getline(lines, line);) names.insert(line.substr(line.find(' ') + 1));
  for (const char* const name : kNames) EXPECT_TRUE(names.contains(name)) << name;
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
    Trainer trainer(scratch.path("run"), socket_path, kHistoryKeepLast);
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
    Outcome outcome = live_until_killed(scratch, n);
    if (!outcome.was_killed) {
      expect_every_name(scratch.path("steps"));
      break;
    }
    ++killed_count;
    recovery_count += recover_killing_at_every_step(scratch);
    expect_allowed(scratch, outcome.oracle, RunOracle::Retention::kMayLag, where);

    const std::string socket_path = scratch.path("socket");
    DaemonProcess daemon(socket_path);
    ASSERT_TRUE(daemon.wait_listening());
    Trainer trainer(scratch.path("run"), socket_path, kHistoryKeepLast);
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
