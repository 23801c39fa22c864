// F15: the trainer is killed at every step of its side of a save. The daemon lives on, what was
// called durable stays, what was not is whole or not there, and the next trainer takes over at
// once.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <string>
#include <vector>

#include "tests/oracle/run_oracle.h"
#include "tests/support/judge_run.h"
#include "tests/support/trainer.h"

extern char** environ;  // NOLINT: POSIX has no header for it.

namespace stillframe::testing {
namespace {

// Of the steps; a sanitizer's build takes a part of those that the plain one takes all of.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kStride = 4;
#else
constexpr int kStride = 1;
#endif
constexpr int kStepCountMax = 500;  // Far above what four saves hit.
constexpr std::int64_t kSaveCount = 4;
constexpr std::uint32_t kKeepLast = 2;  // As client_crash_trainer asks for.

struct Outcome {
  bool was_killed = false;
  int status = 0;
};

Outcome run_trainer(const ScratchDirectory& scratch, std::int64_t first, std::int64_t last,
                    int kill_at, RunOracle& oracle) {
  const std::string output = scratch.path("output");
  posix_spawn_file_actions_t actions;
  (void)::posix_spawn_file_actions_init(&actions);
  (void)::posix_spawn_file_actions_addopen(&actions, 1, output.c_str(),
                                           O_WRONLY | O_CREAT | O_TRUNC, 0600);
  std::vector<std::string> words = {STILLFRAME_CRASH_TRAINER, scratch.path("run"),
                                    scratch.path("socket"), std::to_string(first),
                                    std::to_string(last)};
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::string step_at = "STILLFRAME_STEP_AT=" + std::to_string(kill_at);
  std::vector<char*> variables;
  for (char** entry = environ; *entry != nullptr; ++entry) variables.push_back(*entry);
  if (kill_at > 0) variables.push_back(step_at.data());
  variables.push_back(nullptr);
  pid_t pid = 0;
  EXPECT_EQ(::posix_spawn(&pid, argv[0], &actions, nullptr, argv.data(), variables.data()), 0);
  (void)::posix_spawn_file_actions_destroy(&actions);
  Outcome outcome;
  EXPECT_EQ(::waitpid(pid, &outcome.status, 0), pid);
  outcome.was_killed = WIFSIGNALED(outcome.status) && WTERMSIG(outcome.status) == SIGKILL;
  std::ifstream lines(output);
  std::string word;
  for (std::int64_t step = 0; lines >> word >> step;) {
    EXPECT_TRUE(oracle.note(word, step)) << word;
  }
  return outcome;
}

TEST(CrashingTrainer, at_every_step_loses_only_the_save_it_was_in) {
  int killed_count = 0;
  for (int n = 1; n < kStepCountMax; n += kStride) {
    const std::string where = "killed at step " + std::to_string(n);
    const ScratchDirectory scratch;
    DaemonProcess daemon(scratch.path("socket"));
    ASSERT_TRUE(daemon.wait_listening());
    RunOracle oracle(kKeepLast);
    const Outcome outcome = run_trainer(scratch, 1, kSaveCount, n, oracle);
    if (!outcome.was_killed) {
      EXPECT_EQ(outcome.status, 0);
      EXPECT_EQ(oracle.acknowledged_count(), std::size_t{kSaveCount});
      break;
    }
    ++killed_count;
    ASSERT_TRUE(daemon.is_alive()) << where;

    const std::size_t acknowledged_before = oracle.acknowledged_count();
    const Outcome successor = run_trainer(scratch, 100, 100, 0, oracle);
    EXPECT_EQ(successor.status, 0) << where;
    EXPECT_EQ(oracle.acknowledged_count(), acknowledged_before + 1) << where;
    // Retention comes after DURABLE; it ends before the daemon does.
    EXPECT_EQ(daemon.stop(), 0) << where;
    for (const std::string& complaint :
         judge_recovered(scratch.path("run"), oracle, RunOracle::Retention::kSettled)) {
      ADD_FAILURE() << where << ": " << complaint;
    }
    if (HasFatalFailure()) return;
  }
  std::printf("killed at %d steps\n", killed_count);
  EXPECT_GT(killed_count, 12 / kStride) << "the crash points are not compiled in";
}

}  // namespace
}  // namespace stillframe::testing
