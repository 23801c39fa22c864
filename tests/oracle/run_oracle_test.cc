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

}  // namespace
}  // namespace stillframe::testing
