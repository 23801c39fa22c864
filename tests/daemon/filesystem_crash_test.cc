// F2, F12: the save path on real file systems that lose their power at a step, or hang.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "client/libstillframe.h"
#include "tests/oracle/run_oracle.h"
#include "tests/support/judge_run.h"
#include "tests/support/loop_filesystem.h"
#include "tests/support/run_history.h"
#include "tests/support/trainer.h"

extern char** environ;  // NOLINT: POSIX has no header for it.

namespace stillframe::testing {
namespace {

constexpr int kStepCountMax = 2000;

// Of the steps, unless STILLFRAME_CRASH_STRIDE says otherwise; 1 is every one.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kStride = 32;
#else
constexpr int kStride = 4;
#endif
int stride() {
  const char* const text = std::getenv("STILLFRAME_CRASH_STRIDE");
  const int wanted = text != nullptr ? std::atoi(text) : 0;
  return wanted > 0 ? wanted : kStride;
}

class FilesystemCrash : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (!disk_.missing().empty()) GTEST_SKIP() << disk_.missing();
  }

  pid_t start_trainer(const std::string& run_path, const std::string& socket_path) {
    posix_spawn_file_actions_t actions;
    (void)::posix_spawn_file_actions_init(&actions);
    (void)::posix_spawn_file_actions_addopen(&actions, 1, output_.c_str(),
                                             O_WRONLY | O_CREAT | O_TRUNC, 0600);
    (void)::posix_spawn_file_actions_addopen(&actions, 2, errors_.c_str(),
                                             O_WRONLY | O_CREAT | O_TRUNC, 0600);
    std::vector<std::string> words = {STILLFRAME_CRASH_TRAINER, run_path, socket_path, "history"};
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    pid_t pid = 0;
    EXPECT_EQ(::posix_spawn(&pid, argv[0], &actions, nullptr, argv.data(), environ), 0);
    (void)::posix_spawn_file_actions_destroy(&actions);
    return pid;
  }

  void read_output(RunOracle& oracle) const {
    std::ifstream lines(output_);
    std::string word;
    for (std::int64_t step = 0; lines >> word >> step;) {
      EXPECT_TRUE(oracle.note(word, step)) << word;
    }
  }

  // A history against a daemon that stops at its n-th step, where the power goes. False: it lived
  // through all of it.
  bool lose_power_at(int n, const std::string& run_path, RunOracle& oracle) {
    const std::string socket_path = scratch_.path("socket");
    DaemonProcess daemon(
        socket_path, {{"STILLFRAME_STEP_AT", std::to_string(n)}, {"STILLFRAME_STEP_DO", "stop"}});
    EXPECT_TRUE(daemon.wait_listening());  // No step comes before somebody attaches.
    const pid_t trainer = start_trainer(run_path, socket_path);
    int status = 0;
    bool is_trainer_gone = false;
    bool is_stopped = false;
    while (!is_stopped) {
      const pid_t changed = ::waitpid(daemon.pid(), &status, WUNTRACED | WNOHANG);
      if (changed == daemon.pid()) {
        is_stopped = WIFSTOPPED(status);
        if (!is_stopped) break;
      }
      if (!is_trainer_gone && ::waitpid(trainer, &status, WNOHANG) == trainer) {
        // Asked to end, the daemon first finishes its retention, in which it may still stop.
        is_trainer_gone = true;
        (void)::kill(daemon.pid(), SIGTERM);
      }
      (void)::usleep(1'000);
    }
    if (is_stopped) {
      // What it said before it stopped may be on its way to the trainer still.
      (void)::usleep(5'000);
      EXPECT_TRUE(disk_.shut_down());
    }
    if (!is_trainer_gone) {
      (void)::kill(trainer, SIGKILL);
      (void)::waitpid(trainer, &status, 0);
    }
    daemon.kill_now();
    read_output(oracle);
    return is_stopped;
  }

  ScratchDirectory scratch_;
  const std::string output_ = scratch_.path("output");
  const std::string errors_ = scratch_.path("errors");
  LoopFilesystem disk_{GetParam()};
};
INSTANTIATE_TEST_SUITE_P(Filesystems, FilesystemCrash, ::testing::Values("ext4", "xfs"),
                         [](const auto& one) { return std::string(one.param); });

TEST_P(FilesystemCrash, that_loses_power_at_a_step_holds_what_was_acknowledged) {
  int cut_count = 0;
  for (int n = 1; n < kStepCountMax; n += stride()) {
    const std::string where = std::string(GetParam()) + ", power cut at step " + std::to_string(n);
    const std::string run_path = disk_.path("run" + std::to_string(n));
    RunOracle oracle(kHistoryKeepLast);
    if (!lose_power_at(n, run_path, oracle)) {
      std::ifstream errors(errors_);
      EXPECT_EQ(oracle.acknowledged_count(), kHistorySaveCount)
          << where << ": " << std::string((std::istreambuf_iterator<char>(errors)), {});
      break;
    }
    ++cut_count;
    ASSERT_TRUE(disk_.mount_again()) << where;
    // The next daemon recovers the run, and goes on with it.
    DaemonProcess daemon(scratch_.path("socket"));
    ASSERT_TRUE(daemon.wait_listening()) << where;
    {
      Trainer trainer(run_path, scratch_.path("socket"), kHistoryKeepLast);
      ASSERT_EQ(trainer.attach(), SF_OK) << where << ": " << trainer.error().message;
      for (const std::string& complaint :
           judge_recovered(run_path, oracle, RunOracle::Retention::kMayLag)) {
        ADD_FAILURE() << where << ": " << complaint;
      }
      EXPECT_EQ(trainer.save_durable(100), SF_OK) << where << ": " << trainer.error().message;
      EXPECT_EQ(trainer.close(), SF_OK);
    }
    EXPECT_EQ(daemon.stop(), 0) << where;
    if (HasFailure()) return;
    std::filesystem::remove_all(run_path);  // The disk is small.
  }
  std::printf("%s: power cut at %d steps\n", GetParam(), cut_count);
  EXPECT_GT(cut_count, 60 / stride()) << "the crash points are not compiled in";
}

TEST_P(FilesystemCrash, that_hangs_delays_no_training_and_goes_on_afterwards) {
  using std::chrono::steady_clock;
  constexpr auto kHang = std::chrono::seconds(3);
  constexpr auto kBusyTimeoutMax = std::chrono::seconds(2);  // Of one save() that waits for 100 ms.
  const std::string socket_path = scratch_.path("socket");
  DaemonProcess daemon(socket_path);
  ASSERT_TRUE(daemon.wait_listening());
  Trainer trainer(disk_.path("run"), socket_path, 0);
  ASSERT_EQ(trainer.attach(), SF_OK) << trainer.error().message;
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;

  ASSERT_TRUE(disk_.freeze());
  const auto thaw_at = steady_clock::now() + kHang;
  std::vector<std::uint64_t> accepted;
  int refused_count = 0;
  steady_clock::duration longest{};
  steady_clock::duration longest_status{};
  for (std::int64_t step = 2; steady_clock::now() < thaw_at; ++step) {
    const auto begin = steady_clock::now();
    std::uint64_t ticket = 0;
    const int begun = trainer.save(step, &ticket, 100);
    longest = std::max(longest, steady_clock::now() - begin);
    if (begun == SF_OK) {
      accepted.push_back(ticket);
    } else {
      // Both slots wait for the drive: said, and nothing is held.
      EXPECT_EQ(begun, SF_RESOURCE_EXHAUSTED) << trainer.error().message;
      ++refused_count;
    }
    const auto asked = steady_clock::now();
    char* json = nullptr;
    sf_error error{};
    EXPECT_EQ(sf_daemon_status(socket_path.c_str(), &json, &error), SF_OK) << error.message;
    sf_free(json);
    longest_status = std::max(longest_status, steady_clock::now() - asked);
    (void)::usleep(50'000);
  }
  ASSERT_TRUE(disk_.thaw());
  const auto ms = [](steady_clock::duration time) {
    return static_cast<long>(std::chrono::duration_cast<std::chrono::milliseconds>(time).count());
  };
  std::printf("%s: %zu saves accepted, %d refused; the longest save() %ld ms, status %ld ms\n",
              GetParam(), accepted.size(), refused_count, ms(longest), ms(longest_status));
  EXPECT_LT(longest, kBusyTimeoutMax);
  EXPECT_FALSE(accepted.empty());
  EXPECT_GT(refused_count, 0) << "the drive did not hang";
  sf_error error{};
  for (const std::uint64_t ticket : accepted) {
    EXPECT_EQ(sf_ticket_wait(trainer.session(), ticket, SF_DURABLE, 20'000, &error), SF_OK)
        << error.message;
  }
  EXPECT_EQ(trainer.save_durable(1000), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.close(), SF_OK);
  EXPECT_EQ(daemon.stop(), 0);
  const Verdict verdict = judge(disk_.path("run"));
  EXPECT_TRUE(verdict.complaints.empty());
  EXPECT_EQ(verdict.steps.size(), accepted.size() + 2);
}

// F5: what the kernel itself reports of a device that fails, through io_uring.
TEST(FailingDevice, fails_the_save_with_the_reason_and_keeps_those_before_it) {
  constexpr std::uint64_t kDeviceBytesMax = std::uint64_t{96} << 20;
  LoopFilesystem disk("ext4", kDeviceBytesMax);
  if (!disk.missing().empty()) GTEST_SKIP() << disk.missing();
  const ScratchDirectory scratch;
  const std::string socket_path = scratch.path("socket");
  const std::string run_path = disk.path("run");
  RunOracle oracle(0);
  DaemonProcess daemon(socket_path);
  ASSERT_TRUE(daemon.wait_listening());
  Trainer trainer(run_path, socket_path, 0);
  ASSERT_EQ(trainer.attach(), SF_OK) << trainer.error().message;
  int failed = SF_OK;
  std::string reason;
  for (std::int64_t step = 1; step <= 100 && failed == SF_OK; ++step) {
    oracle.began(step);
    failed = trainer.save_durable(step);
    if (failed == SF_OK) oracle.acknowledged(step);
    reason = trainer.error().message;
  }
  std::printf("%zu saves durable, then: %s\n", oracle.acknowledged_count(), reason.c_str());
  EXPECT_GT(oracle.acknowledged_count(), 5U);
  // The loop device hands on its tmpfs's ENOSPC, where most drives would say EIO.
  EXPECT_TRUE(failed == SF_UNAVAILABLE || failed == SF_RESOURCE_EXHAUSTED) << failed;
  EXPECT_NE(reason.find(run_path), std::string::npos) << reason;
  char* json = nullptr;
  sf_error error{};
  EXPECT_EQ(sf_daemon_status(socket_path.c_str(), &json, &error), SF_OK) << error.message;
  EXPECT_NE(std::string(json).find("last_error"), std::string::npos) << json;
  sf_free(json);
  const Verdict verdict = judge(run_path);
  for (const std::string& complaint : verdict.complaints) ADD_FAILURE() << complaint;
  for (const std::string& complaint : oracle.judge(verdict.steps, RunOracle::Retention::kMayLag)) {
    ADD_FAILURE() << complaint;
  }
  (void)trainer.close();
  EXPECT_EQ(daemon.stop(), 0);
}

}  // namespace
}  // namespace stillframe::testing
