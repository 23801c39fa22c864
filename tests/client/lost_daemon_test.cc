// The daemon dies, stops, comes back, was never there: every call answers within its deadline, and
// the session goes on with the next daemon.
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <fstream>
#include <thread>

#include "base/unique_fd.h"
#include "client/libstillframe.h"
#include "tests/client/test_session.h"

namespace stillframe::testing {
namespace {

class LostDaemon : public SessionTest {
 public:
  sf_attach_options autostart_options() {
    sf_attach_options options = attach_options();
    options.no_autostart = 0;
    options.daemon_path = STILLFRAMED_PATH;
    return options;
  }
  // With a daemon that leaves a second after its last client.
  void attach_and_start(const sf_attach_options& options, const ByteTensors& tensors) {
    ASSERT_EQ(::setenv("STILLFRAME_IDLE_EXIT_S", "1", 1), 0);
    ASSERT_EQ(sf_attach(&options, &session_, &error_), SF_OK) << error_.message;
    const sf_part part = tensors.part();
    ASSERT_EQ(sf_layout_register(session_, &part, 1, 10'000, &error_), SF_OK) << error_.message;
  }
  pid_t answering_pid() {
    char* json = nullptr;
    if (sf_daemon_status(socket_path().c_str(), &json, &error_) != SF_OK) return 0;
    const std::string status = json;
    sf_free(json);
    const auto pid_at = status.find("\"pid\":");
    return pid_at == std::string::npos ? 0 : std::atoi(status.c_str() + pid_at + 6);
  }
};

// Until the last thread of a killed process, and its sockets with it, is gone; that its first one
// is a zombie does not tell that.
void wait_for_end(pid_t pid) {
  const UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!process) return;
  pollfd ended{.fd = process.get(), .events = POLLIN, .revents = 0};
  (void)::poll(&ended, 1, 10'000);
}

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

class Stopwatch {
 public:
  std::int64_t ms() const {
    return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() -
                                                                 begin_)
        .count();
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

TEST_F(LostDaemon, waiting_for_durable_ends_at_once_when_it_dies) {
  start_daemon();
  ByteTensors tensors({2 * kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(begin({}, tensors.sources(false)), SF_OK) << error_.message;
  ASSERT_EQ(wait_durable(), SF_OK);
  ASSERT_EQ(begin({.capture = SF_CAPTURE_LAZY}, tensors.sources(true)), SF_OK) << error_.message;
  // Stopped, it cannot make the save durable before it is killed.
  ASSERT_EQ(::kill(daemon_->pid(), SIGSTOP), 0);
  ASSERT_EQ(sf_capture_wait(session_, ticket_, 5000, 1, &error_), SF_OK) << error_.message;
  ASSERT_EQ(sf_capture_publish(session_, ticket_, &error_), SF_OK) << error_.message;
  EXPECT_EQ(sf_ticket_wait(session_, ticket_, SF_DURABLE, 50, &error_), SF_TIMEOUT);
  std::thread killer([this] { daemon_->kill_now(); });
  const Stopwatch watch;
  EXPECT_EQ(sf_ticket_wait(session_, ticket_, SF_DURABLE, 20'000, &error_), SF_UNAVAILABLE);
  EXPECT_LT(watch.ms(), 5'000);
  killer.join();
  EXPECT_EQ(ticket_info().state, SF_FAILED);
  EXPECT_EQ(ticket_info().failure.code, SF_UNAVAILABLE);
}

TEST_F(LostDaemon, a_capture_that_runs_when_it_dies_fails_and_lets_go_of_the_tensors) {
  start_daemon();
  ByteTensors tensors({16 * kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  for (const bool is_voided : {false, true}) {
    if (is_voided) start_daemon();
    ASSERT_EQ(begin({.capture = SF_CAPTURE_LAZY}, tensors.sources(true)), SF_OK) << error_.message;
    daemon_->kill_now();
    if (is_voided) {
      EXPECT_EQ(sf_capture_void(session_, ticket_, 0, "gone", &error_), SF_OK);
    } else {
      // The copying may have ended before the end of the socket came.
      const int waited = sf_capture_wait(session_, ticket_, 5000, 1, &error_);
      EXPECT_TRUE(waited == SF_UNAVAILABLE || waited == SF_OK) << waited;
      EXPECT_EQ(sf_capture_publish(session_, ticket_, &error_), SF_UNAVAILABLE);
    }
    for (auto& byte : tensors.bytes(0)) ++byte;
    EXPECT_EQ(ticket_info().state, SF_FAILED);
  }
}

TEST_F(LostDaemon, the_next_save_finds_its_successor_and_keeps_the_arena) {
  start_daemon();
  ByteTensors tensors({5 * kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  for (std::int64_t step = 1; step <= 4; ++step) {
    ASSERT_EQ(begin({.step = step}, tensors.sources(false)), SF_OK) << error_.message;
    ASSERT_EQ(wait_durable(), SF_OK) << error_.message;
    EXPECT_EQ(ticket_info().sequence, static_cast<std::uint64_t>(step));
    daemon_->kill_now();
    EXPECT_EQ(ticket_info().state, SF_DURABLE) << "what was durable stays so";
    start_daemon();
  }
  EXPECT_EQ(sf_session_settle(session_, 5000, &error_), SF_OK) << error_.message;
}

TEST_F(LostDaemon, without_a_successor_a_save_fails_at_once_until_there_is_one) {
  start_daemon();
  ByteTensors tensors({kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  daemon_->kill_now();
  for (int i = 0; i < 3; ++i) {
    const Stopwatch watch;
    EXPECT_EQ(begin({}, tensors.sources(false)), SF_UNAVAILABLE);
    EXPECT_NE(std::string(error_.message).find(socket_path()), std::string::npos) << error_.message;
    EXPECT_EQ(sf_session_settle(session_, 5000, &error_), SF_UNAVAILABLE);
    EXPECT_LT(watch.ms(), 2'000);
  }
  start_daemon();
  ASSERT_EQ(begin({}, tensors.sources(false)), SF_OK) << error_.message;
  EXPECT_EQ(wait_durable(), SF_OK) << error_.message;
}

TEST_F(LostDaemon, waiting_for_one_that_is_stopped_ends) {
  start_daemon();
  ByteTensors tensors({2 * kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(begin({.capture = SF_CAPTURE_LAZY}, tensors.sources(true)), SF_OK) << error_.message;
  ASSERT_EQ(::kill(daemon_->pid(), SIGSTOP), 0);
  ASSERT_EQ(sf_capture_wait(session_, ticket_, 5000, 1, &error_), SF_OK) << error_.message;
  ASSERT_EQ(sf_capture_publish(session_, ticket_, &error_), SF_OK) << error_.message;
  // As Python waits: in slices, so that Ctrl-C is heard.
  const Stopwatch watch;
  int waited = SF_TIMEOUT;
  while (waited == SF_TIMEOUT && watch.ms() < 100'000) {
    waited = sf_ticket_wait(session_, ticket_, SF_DURABLE, 100, &error_);
  }
  EXPECT_EQ(waited, SF_UNAVAILABLE);
  EXPECT_NE(std::string(error_.message).find("does not answer"), std::string::npos)
      << error_.message;
  EXPECT_EQ(ticket_info().state, SF_FAILED);
  ASSERT_EQ(::kill(daemon_->pid(), SIGCONT), 0);
  ASSERT_EQ(begin({}, tensors.sources(false)), SF_OK) << error_.message;
  EXPECT_EQ(wait_durable(), SF_OK) << error_.message;
}

TEST_F(LostDaemon, one_that_is_only_silent_is_waited_for) {
  start_daemon();
  ByteTensors tensors({2 * kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(begin({.capture = SF_CAPTURE_LAZY}, tensors.sources(true)), SF_OK) << error_.message;
  ASSERT_EQ(sf_capture_wait(session_, ticket_, 5000, 1, &error_), SF_OK) << error_.message;
  // Longer than it may be silent and take to answer: it has nothing to say, for it is not told.
  EXPECT_EQ(sf_ticket_wait(session_, ticket_, SF_DURABLE, 12'000, &error_), SF_TIMEOUT);
  ASSERT_EQ(sf_capture_publish(session_, ticket_, &error_), SF_OK) << error_.message;
  EXPECT_EQ(wait_durable(), SF_OK) << error_.message;
}

TEST_F(LostDaemon, one_that_is_stopped_costs_a_save_its_deadline_once) {
  start_daemon();
  ByteTensors tensors({kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(begin({}, tensors.sources(false)), SF_OK) << error_.message;
  ASSERT_EQ(wait_durable(), SF_OK) << error_.message;
  ASSERT_EQ(::kill(daemon_->pid(), SIGSTOP), 0);
  // It takes the slot on offer, unless the stop came before the offer.
  const int offered = begin({.busy_timeout_ms = 100}, tensors.sources(false));
  const Stopwatch first;
  EXPECT_EQ(begin({.busy_timeout_ms = 100}, tensors.sources(false)), SF_UNAVAILABLE);
  EXPECT_LT(first.ms(), 10'000) << "the deadline of an answer";
  const Stopwatch second;
  EXPECT_EQ(begin({.busy_timeout_ms = 100}, tensors.sources(false)), SF_UNAVAILABLE);
  EXPECT_LT(second.ms(), 5'000) << "that of a new connection";
  const Stopwatch third;
  EXPECT_EQ(begin({.busy_timeout_ms = 100}, tensors.sources(false)), SF_UNAVAILABLE);
  EXPECT_LT(third.ms(), 1'000) << "a long attempt is not repeated at every save";
  if (offered == SF_OK) {
    EXPECT_EQ(wait_durable(), SF_UNAVAILABLE) << "that went with the connection";
  } else {
    EXPECT_EQ(offered, SF_UNAVAILABLE);
  }
}

TEST_F(LostDaemon, an_attach_without_one_says_where_it_looked) {
  sf_attach_options options = attach_options();
  options.timeout_ms = 500;
  const Stopwatch watch;
  EXPECT_EQ(sf_attach(&options, &session_, &error_), SF_UNAVAILABLE);
  EXPECT_EQ(session_, nullptr);
  EXPECT_NE(std::string(error_.message).find(socket_path()), std::string::npos) << error_.message;
  EXPECT_LT(watch.ms(), 2'000);
  char* json = nullptr;
  EXPECT_EQ(sf_daemon_status(socket_path().c_str(), &json, &error_), SF_UNAVAILABLE);
}

// --- Autostart -----------------------------------------------------------------------------------

TEST_F(LostDaemon, a_private_one_is_started_on_demand_and_started_again_after_its_death) {
  ByteTensors tensors({kMiB});
  const sf_attach_options options = autostart_options();
  attach_and_start(options, tensors);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(begin({}, tensors.sources(false)), SF_OK) << error_.message;
  EXPECT_EQ(wait_durable(), SF_OK) << error_.message;

  const pid_t pid = answering_pid();
  ASSERT_GT(pid, 1);
  EXPECT_EQ(::getpgid(pid), ::getsid(pid)) << "a session of its own";
  EXPECT_NE(::getsid(pid), ::getsid(0));

  ASSERT_EQ(::kill(pid, SIGKILL), 0);
  wait_for_end(pid);
  ASSERT_EQ(begin({.step = 2}, tensors.sources(false)), SF_OK) << error_.message;
  EXPECT_EQ(wait_durable(), SF_OK) << error_.message;
  EXPECT_EQ(sf_session_close(session_, 5000, &error_), SF_OK);
  session_ = nullptr;

  // It leaves by itself; an attach that meets it on its way out starts another. Nothing tells when
  // it leaves, so these come shortly before, at and after its idle time of 1 s.
  for (int i = 0; i < 5; ++i) {
    ASSERT_EQ(sf_attach(&options, &session_, &error_), SF_OK) << error_.message;
    EXPECT_EQ(sf_session_close(session_, 5000, &error_), SF_OK);
    session_ = nullptr;
    (void)::usleep(static_cast<useconds_t>(990'000 + i * 5'000));
  }
  ASSERT_EQ(::unsetenv("STILLFRAME_IDLE_EXIT_S"), 0);
}

TEST_F(LostDaemon, a_save_that_meets_it_dying_is_begun_with_its_successor) {
  ByteTensors tensors({kMiB});
  const sf_attach_options options = autostart_options();
  attach_and_start(options, tensors);
  ASSERT_FALSE(HasFatalFailure());
  for (int i = 0; i < 20; ++i) {
    ASSERT_EQ(begin({.step = 2 * i}, tensors.sources(false)), SF_OK) << error_.message;
    ASSERT_EQ(wait_durable(), SF_OK) << error_.message;
    const pid_t pid = answering_pid();
    ASSERT_GT(pid, 1);
    ASSERT_EQ(::kill(pid, SIGKILL), 0);
    (void)::usleep(static_cast<useconds_t>(i * 50));
    ASSERT_EQ(begin({.step = 2 * i + 1}, tensors.sources(false)), SF_OK) << i << error_.message;
    // Captured by the dying one it is lost, which its ticket tells; by the next one it is kept.
    const int waited = wait_durable();
    EXPECT_TRUE(waited == SF_OK || waited == SF_UNAVAILABLE) << error_.message;
  }
  ASSERT_EQ(::unsetenv("STILLFRAME_IDLE_EXIT_S"), 0);
}

TEST_F(LostDaemon, a_program_that_is_no_daemon_or_is_missing_is_named_with_its_words) {
  sf_attach_options options = attach_options();
  options.no_autostart = 0;
  const std::string missing = scratch_.path("nothing-here");
  options.daemon_path = missing.c_str();
  EXPECT_EQ(sf_attach(&options, &session_, &error_), SF_UNAVAILABLE);
  EXPECT_NE(std::string(error_.message).find(missing), std::string::npos) << error_.message;

  const std::string failing = scratch_.path("failing");
  std::ofstream(failing) << "#!/bin/sh\necho 'no luck today' >&2\nexit 3\n";
  ASSERT_EQ(::chmod(failing.c_str(), 0700), 0);
  options.daemon_path = failing.c_str();
  EXPECT_EQ(sf_attach(&options, &session_, &error_), SF_UNAVAILABLE);
  EXPECT_NE(std::string(error_.message).find("no luck today"), std::string::npos) << error_.message;

  const std::string hanging = scratch_.path("hanging");
  std::ofstream(hanging) << "#!/bin/sh\nexec sleep 600\n";
  ASSERT_EQ(::chmod(hanging.c_str(), 0700), 0);
  options.daemon_path = hanging.c_str();
  options.timeout_ms = 300;
  const Stopwatch watch;
  EXPECT_EQ(sf_attach(&options, &session_, &error_), SF_UNAVAILABLE);
  EXPECT_LT(watch.ms(), 3'000);
}

}  // namespace
}  // namespace stillframe::testing
