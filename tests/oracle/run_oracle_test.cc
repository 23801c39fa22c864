// A judge that never condemns is worth nothing: each loss here must be seen.
#include "tests/oracle/run_oracle.h"

#include <gtest/gtest.h>

namespace stillframe::testing {
namespace {

using Retention = RunOracle::Retention;

// Steps 10, 20, ..., of which the first `acknowledged` were called durable.
RunOracle after(std::uint32_t keep_last, int begun, int acknowledged) {
  RunOracle oracle(keep_last);
  for (int i = 1; i <= begun; ++i) {
    oracle.began(10 * i);
    if (i <= acknowledged) oracle.acknowledged(10 * i);
  }
  return oracle;
}

std::size_t complaint_count(const RunOracle& oracle, const std::vector<std::int64_t>& restorable,
                            Retention retention = Retention::kMayLag) {
  return oracle.judge(restorable, retention).size();
}

TEST(RunOracle, allows_the_old_or_the_new_one_of_a_save_without_an_answer) {
  const RunOracle oracle = after(1, 3, 2);
  EXPECT_EQ(complaint_count(oracle, {20}), 0U);
  EXPECT_EQ(complaint_count(oracle, {20, 30}), 0U);
  EXPECT_EQ(complaint_count(oracle, {30}), 0U);
  EXPECT_EQ(complaint_count(oracle, {10, 20}), 0U) << "retention has not come so far";
}

TEST(RunOracle, sees_that_an_acknowledged_one_is_lost) {
  const RunOracle oracle = after(2, 4, 4);
  EXPECT_EQ(complaint_count(oracle, {30, 40}), 0U);
  EXPECT_GE(complaint_count(oracle, {40}), 1U);
  EXPECT_EQ(complaint_count(oracle, {20, 40}), 1U);
  EXPECT_EQ(complaint_count(oracle, {10, 20, 30}), 1U) << "the newest";
  EXPECT_EQ(complaint_count(oracle, {}), 4U);
  EXPECT_EQ(complaint_count(after(0, 3, 3), {20, 30}), 1U) << "nothing may go";
}

TEST(RunOracle, sees_what_nobody_saved_and_what_is_out_of_order) {
  const RunOracle oracle = after(2, 2, 2);
  EXPECT_EQ(complaint_count(oracle, {10, 20, 25}), 1U);
  EXPECT_EQ(complaint_count(oracle, {20, 10}), 1U);
}

TEST(RunOracle, sees_that_retention_does_not_retain) {
  const RunOracle oracle = after(2, 6, 6);
  EXPECT_EQ(complaint_count(oracle, {50, 60}, Retention::kSettled), 0U);
  EXPECT_EQ(complaint_count(oracle, {40, 50, 60}, Retention::kSettled), 1U);
  EXPECT_EQ(complaint_count(oracle, {20, 30, 40, 50, 60}), 1U);
}

TEST(RunOracle, sees_that_a_pinned_one_is_lost_and_that_a_removed_one_is_back) {
  RunOracle oracle = after(1, 4, 4);
  oracle.pinning(10);
  EXPECT_EQ(complaint_count(oracle, {40}, Retention::kSettled), 0U);
  EXPECT_EQ(complaint_count(oracle, {10, 40}, Retention::kSettled), 0U) << "it may be pinned";
  oracle.pinned(10);
  EXPECT_EQ(complaint_count(oracle, {40}, Retention::kSettled), 1U);
  oracle.removing(30);
  EXPECT_EQ(complaint_count(oracle, {10, 40}), 0U);
  EXPECT_EQ(complaint_count(oracle, {10, 30, 40}), 0U);
  oracle.removed(30);
  EXPECT_EQ(complaint_count(oracle, {10, 30, 40}), 1U);
  oracle.unpinning(10);
  EXPECT_EQ(complaint_count(oracle, {40}), 0U);
  EXPECT_EQ(complaint_count(oracle, {10, 40}), 0U);
}

TEST(RunOracle, counts_a_newer_one_that_was_removed_since) {
  RunOracle oracle = after(1, 3, 3);
  EXPECT_EQ(complaint_count(oracle, {}), 3U);
  oracle.removing(30);
  oracle.removed(30);
  EXPECT_EQ(complaint_count(oracle, {}), 0U) << "the two before it were retired behind it";
  EXPECT_EQ(complaint_count(after(0, 3, 3), {}), 3U);
}

TEST(RunOracle, forgives_the_loss_of_what_the_drive_harmed_and_of_nothing_else) {
  RunOracle oracle = after(1, 3, 3);
  oracle.harmed(30);
  EXPECT_EQ(complaint_count(oracle, {20}), 0U);
  EXPECT_EQ(complaint_count(oracle, {20, 30}), 0U);
  EXPECT_EQ(complaint_count(oracle, {10}), 1U);
}

TEST(RunOracle, sees_pins_that_are_lost_and_pins_of_nobody) {
  RunOracle oracle = after(0, 2, 2);
  EXPECT_EQ(oracle.judge_pins({20}).size(), 1U);
  oracle.pinning(10);
  EXPECT_TRUE(oracle.judge_pins({}).empty());
  EXPECT_TRUE(oracle.judge_pins({10}).empty());
  oracle.pinned(10);
  EXPECT_EQ(oracle.judge_pins({}).size(), 1U);
  oracle.unpinning(10);
  EXPECT_TRUE(oracle.judge_pins({}).empty());
  EXPECT_TRUE(oracle.judge_pins({10}).empty());
  oracle.unpinned(10);
  EXPECT_EQ(oracle.judge_pins({10}).size(), 1U);
}

TEST(RunOracle, takes_the_words_of_another_process) {
  RunOracle oracle(0);
  EXPECT_TRUE(oracle.note("begin", 10));
  EXPECT_EQ(complaint_count(oracle, {}), 0U);
  EXPECT_TRUE(oracle.note("durable", 10));
  EXPECT_EQ(complaint_count(oracle, {}), 1U);
  EXPECT_FALSE(oracle.note("saved", 10));
}

}  // namespace
}  // namespace stillframe::testing
