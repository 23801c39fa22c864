// A trainer with a retention of its own removes checkpoints: only behind a newer one.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "client/libstillframe.h"
#include "tests/client/test_session.h"

namespace stillframe::testing {
namespace {

class Remove : public SessionTest {
 protected:
  void save(std::int64_t step) {
    ASSERT_EQ(begin({.step = step}, tensors_.sources(false)), SF_OK) << error_.message;
    ASSERT_EQ(wait_durable(), SF_OK) << error_.message;
  }
  int remove(std::uint64_t sequence) {
    return sf_checkpoint_remove(session_, sequence, 20'000, &error_);
  }
  bool exists(const std::string& name) const {
    return std::filesystem::exists(run_path() + "/" + name);
  }

  ByteTensors tensors_{{70'001, 4096}};
};

TEST_F(Remove, takes_an_older_one_and_leaves_the_newest) {
  start_daemon();
  attach(tensors_);
  ASSERT_FALSE(HasFatalFailure());
  save(10);
  EXPECT_EQ(remove(1), SF_INVALID_ARGUMENT) << "the only one";
  save(20);
  EXPECT_EQ(remove(2), SF_INVALID_ARGUMENT) << "an older one is no successor";
  ASSERT_EQ(remove(1), SF_OK) << error_.message;
  EXPECT_FALSE(exists("00000001-step-10"));
  EXPECT_TRUE(exists("00000002-step-20"));
  EXPECT_EQ(remove(1), SF_NOT_FOUND);
  EXPECT_EQ(restore(tensors_), SF_OK) << error_.message;
}

TEST_F(Remove, is_refused_when_the_newer_one_has_lost_a_file) {
  start_daemon();
  attach(tensors_);
  ASSERT_FALSE(HasFatalFailure());
  save(10);
  save(20);
  std::filesystem::remove(run_path() + "/00000002-step-20/model.safetensors");
  EXPECT_EQ(remove(1), SF_INVALID_ARGUMENT);
  EXPECT_TRUE(exists("00000001-step-10/manifest.json"));
}

TEST_F(Remove, is_refused_for_a_tagged_one) {
  start_daemon();
  attach(tensors_);
  ASSERT_FALSE(HasFatalFailure());
  save(10);
  save(20);
  std::ofstream(run_path() + "/.stillframe/tags/paper") << "1\n";
  EXPECT_EQ(remove(1), SF_INVALID_ARGUMENT);
  EXPECT_NE(std::string(error_.message).find("paper"), std::string::npos) << error_.message;
  EXPECT_TRUE(exists("00000001-step-10/manifest.json"));
}

TEST_F(Remove, waits_for_its_turn_behind_three_others) {
  start_daemon();
  attach(tensors_);
  ASSERT_FALSE(HasFatalFailure());
  for (std::int64_t step = 1; step <= 5; ++step) save(step);
  // The run's I/O thread is in this save until its capture ends.
  ASSERT_EQ(begin({.step = 6, .capture = SF_CAPTURE_LAZY}, tensors_.sources(true)), SF_OK);
  for (std::uint64_t sequence = 1; sequence <= 3; ++sequence) {
    EXPECT_EQ(sf_checkpoint_remove(session_, sequence, 0, &error_), SF_TIMEOUT);
  }
  int refused = SF_TIMEOUT;  // On a machine too busy for the daemon to answer in time.
  for (int turn = 0; turn < 20 && refused == SF_TIMEOUT; ++turn) {
    refused = sf_checkpoint_remove(session_, 4, 200, &error_);
  }
  EXPECT_EQ(refused, SF_RESOURCE_EXHAUSTED) << error_.message;
  ASSERT_EQ(sf_capture_publish(session_, ticket_, &error_), SF_OK) << error_.message;
  EXPECT_EQ(remove(4), SF_OK) << error_.message;
  for (int sequence = 1; sequence <= 4; ++sequence) {
    const std::string number = std::to_string(sequence);
    EXPECT_FALSE(exists("0000000" + number + "-step-" + number));
  }
}

}  // namespace
}  // namespace stillframe::testing
