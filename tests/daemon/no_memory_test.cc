// The daemon runs out of memory at any moment of its life. It may end, as at a crash; whatever it
// does, nothing that it acknowledged is lost, no trainer waits for ever, and its successor goes on.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>

#include "tests/format/seed.h"
#include "tests/oracle/run_oracle.h"
#include "tests/support/judge_run.h"
#include "tests/support/trainer.h"

namespace stillframe::testing {
namespace {

constexpr std::uint32_t kKeepLast = 1;
constexpr std::int64_t kSaveCount = 3;
// Of the daemon's some thousand allocations; STILLFRAME_ALLOCATIONS=0 stands for every one.
constexpr std::uint64_t kPointCount = 100;

struct Outcome {
  bool has_ended = false;
  RunOracle oracle{kKeepLast};
};

Outcome train(const ScratchDirectory& scratch, const DaemonProcess::Variables& variables) {
  const std::string socket_path = scratch.path("socket");
  DaemonProcess::Variables all = variables;
  all["LD_PRELOAD"] = STILLFRAME_FAILING_NEW;
  DaemonProcess daemon(socket_path, all);
  Outcome outcome;
  if (daemon.wait_listening()) {
    Trainer trainer(scratch.path("run"), socket_path, kKeepLast);
    if (trainer.attach() == SF_OK) {
      for (std::int64_t step = 1; step <= kSaveCount; ++step) {
        outcome.oracle.began(step);
        if (trainer.save_durable(step) == SF_OK) outcome.oracle.acknowledged(step);
      }
      (void)trainer.close();
    }
  }
  outcome.has_ended = daemon.stop() != 0;
  return outcome;
}

std::uint64_t allocation_count() {
  const ScratchDirectory scratch;
  const std::string path = scratch.path("count");
  (void)train(scratch, {{"STILLFRAME_TEST_NEW_COUNT_FILE", path}});
  std::uint64_t count = 0;
  std::ifstream(path) >> count;
  return count;
}

TEST(DaemonWithoutMemory, at_any_allocation_loses_nothing_that_it_acknowledged) {
  std::mt19937_64 random = format::seeded_generator();
  const std::uint64_t allocations = allocation_count();
  ASSERT_GT(allocations, 1000U) << "its operator new is not ours";
  std::uint64_t points = kPointCount;
  if (const char* const wanted = std::getenv("STILLFRAME_ALLOCATIONS")) {
    points = std::strtoull(wanted, nullptr, 10);
    if (points == 0) points = allocations;
  }
  std::uint64_t ended_count = 0;
  for (std::uint64_t point = 0; point < points; ++point) {
    const std::uint64_t begin = point * allocations / points;
    const std::uint64_t end = std::max(begin + 1, (point + 1) * allocations / points);
    const std::uint64_t nth = begin + format::pick(random, end - begin);
    SCOPED_TRACE("allocation " + std::to_string(nth));
    const ScratchDirectory scratch;
    Outcome outcome = train(scratch, {{"STILLFRAME_TEST_FAILING_NEW", std::to_string(nth)}});
    if (outcome.has_ended) ++ended_count;

    const std::string socket_path = scratch.path("socket");
    DaemonProcess successor(socket_path);
    ASSERT_TRUE(successor.wait_listening());
    Trainer trainer(scratch.path("run"), socket_path, kKeepLast);
    ASSERT_EQ(trainer.attach(), SF_OK) << trainer.error().message;
    for (const std::string& complaint :
         judge_recovered(scratch.path("run"), outcome.oracle, RunOracle::Retention::kMayLag)) {
      ADD_FAILURE() << complaint;
    }
    EXPECT_EQ(trainer.save_durable(9), SF_OK) << trainer.error().message;
    EXPECT_EQ(trainer.close(), SF_OK);
    EXPECT_EQ(successor.stop(), 0);
    if (HasFailure()) return;
  }
  std::cout << allocations << " allocations, " << points << " failed in turn, the daemon ended at "
            << ended_count << "\n";
  EXPECT_GT(ended_count, 0U);
}

}  // namespace
}  // namespace stillframe::testing
