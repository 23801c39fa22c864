// Restoring: from the snapshot in memory, from the drive, from damaged bytes.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "client/libstillframe.h"
#include "tests/client/test_session.h"

namespace stillframe::testing {
namespace {

class Restore : public SessionTest {
 protected:
  // Changes one byte of the newest checkpoint's model part.
  void damage(std::uint64_t offset) {
    for (const auto& entry : std::filesystem::directory_iterator(run_path())) {
      const std::string file = entry.path().string() + "/model.safetensors";
      const int fd = ::open(file.c_str(), O_RDWR | O_CLOEXEC);
      if (fd < 0 || entry.is_symlink()) continue;
      char byte = 0;
      EXPECT_EQ(::pread(fd, &byte, 1, static_cast<off_t>(offset)), 1);
      byte = static_cast<char>(byte ^ 1);
      EXPECT_EQ(::pwrite(fd, &byte, 1, static_cast<off_t>(offset)), 1);
      (void)::close(fd);
    }
  }
  void save(ByteTensors& tensors) {
    ASSERT_EQ(begin({}, tensors.sources(false)), SF_OK) << error_.message;
    ASSERT_EQ(wait_durable(), SF_OK) << error_.message;
  }
  // In a process of its own, which ends without a word to the daemon.
  void save_and_die(ByteTensors& tensors) {
    const pid_t trainer = ::fork();
    if (trainer == 0) {
      attach(tensors);
      save(tensors);
      ::_exit(HasFailure() ? 1 : 0);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(trainer, &status, 0), trainer);
    ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  // Once the daemon knows of its end.
  void attach_behind_it(const std::string& path) {
    sf_attach_options options = attach_options();
    options.run_path = path.c_str();
    for (int i = 0; i < 500 && sf_attach(&options, &session_, &error_) != SF_OK; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    ASSERT_NE(session_, nullptr) << error_.message;
  }
};

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

TEST_F(Restore, takes_the_snapshot_in_memory_also_for_a_restarted_trainer) {
  start_daemon();
  ByteTensors tensors({20 * kMiB + 5, 100});
  attach(tensors);
  save(tensors);
  ASSERT_FALSE(HasFatalFailure());
  const auto saved = tensors.all();
  for (auto& byte : tensors.bytes(0)) byte = 0;
  sf_read_stats stats{};
  stats.struct_bytes = sizeof stats;
  ASSERT_EQ(restore(tensors, session_, &stats), SF_OK) << error_.message;
  EXPECT_EQ(stats.from_memory, 1);
  EXPECT_GT(stats.bytes, 20 * kMiB);
  EXPECT_EQ(tensors.all(), saved);
  ASSERT_EQ(restore(tensors, nullptr, &stats), SF_OK) << error_.message;
  EXPECT_EQ(stats.from_memory, 0);
  EXPECT_EQ(tensors.all(), saved);
  save(tensors);
  save(tensors);
}

TEST_F(Restore, takes_the_snapshot_in_memory_also_after_a_session_that_only_looked) {
  start_daemon();
  ByteTensors tensors({3 * kMiB + 5, 100});
  save_and_die(tensors);
  attach_behind_it(run_path());
  ASSERT_FALSE(HasFatalFailure());
  close();
  attach(tensors);
  const auto saved = tensors.all();
  for (auto& byte : tensors.bytes(0)) byte = 0;
  sf_read_stats stats{};
  stats.struct_bytes = sizeof stats;
  ASSERT_EQ(restore(tensors, session_, &stats), SF_OK) << error_.message;
  EXPECT_EQ(stats.from_memory, 1);
  EXPECT_EQ(tensors.all(), saved);
  // One that has saved gives the memory back.
  save(tensors);
  close();
  attach(tensors);
  ASSERT_EQ(restore(tensors, session_, &stats), SF_OK) << error_.message;
  EXPECT_EQ(stats.from_memory, 0);
}

TEST_F(Restore, finds_nothing_of_a_run_whose_directory_was_removed_and_saves_begin_anew) {
  start_daemon();
  ByteTensors tensors({3 * kMiB, 100});
  save_and_die(tensors);
  // The daemon keeps the dead trainer's snapshot, and with it the run, for a restart.
  std::filesystem::remove_all(run_path());
  attach_behind_it(run_path());
  const sf_part part = tensors.part();
  ASSERT_EQ(sf_layout_register(session_, &part, 1, 10'000, &error_), SF_OK) << error_.message;
  EXPECT_EQ(restore(tensors, session_), SF_NOT_FOUND) << error_.message;
  save(tensors);
  EXPECT_EQ(ticket_info().sequence, 1U);
  EXPECT_EQ(restore(tensors, session_), SF_OK) << error_.message;
}

TEST_F(Restore, finds_a_run_that_was_renamed_under_its_new_name) {
  start_daemon();
  ByteTensors tensors({3 * kMiB, 100});
  save_and_die(tensors);
  std::filesystem::rename(run_path(), scratch_.path("renamed"));
  attach_behind_it(scratch_.path("renamed"));
  ASSERT_FALSE(HasFatalFailure());
  const sf_part part = tensors.part();
  ASSERT_EQ(sf_layout_register(session_, &part, 1, 10'000, &error_), SF_OK) << error_.message;
  save(tensors);
  EXPECT_EQ(ticket_info().sequence, 2U);
}

TEST_F(Restore, falls_back_to_the_drive_where_the_layout_is_another_one) {
  start_daemon();
  ByteTensors tensors({2 * kMiB});
  attach(tensors);
  save(tensors);
  ASSERT_FALSE(HasFatalFailure());
  ByteTensors other({1 * kMiB});
  const sf_part part = other.part();
  ASSERT_EQ(sf_layout_register(session_, &part, 1, 10'000, &error_), SF_OK) << error_.message;
  sf_read_stats stats{};
  stats.struct_bytes = sizeof stats;
  ASSERT_EQ(restore(tensors, session_, &stats), SF_OK) << error_.message;
  EXPECT_EQ(stats.from_memory, 0);
}

// This process has the slots mapped too, so it can damage what lies in them.
std::uint64_t overwrite_arena(std::uint8_t old_value, std::uint8_t new_value) {
  std::ifstream maps("/proc/self/maps");
  std::uint64_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    if (line.find("stillframe-arena") == line.npos) continue;
    const std::uint64_t begin = std::stoull(line, nullptr, 16);
    const std::uint64_t end = std::stoull(line.substr(line.find('-') + 1), nullptr, 16);
    // Every tensor's last byte, and with it bytes of more than one extent.
    for (auto* byte = reinterpret_cast<std::uint8_t*>(end - 1);
         byte >= reinterpret_cast<std::uint8_t*>(begin); --byte) {
      if (*byte != old_value) continue;
      *byte = new_value;
      if (++count == 10) return count;
    }
  }
  return count;
}

TEST_F(Restore, falls_back_to_the_drive_where_the_memory_is_not_what_the_checkpoint_says) {
  start_daemon();
  ByteTensors tensors({5 * kMiB, 3 * kMiB});
  attach(tensors);
  save(tensors);
  ASSERT_FALSE(HasFatalFailure());
  const auto saved = tensors.all();
  ASSERT_GT(overwrite_arena(saved[1].back(), 0xEE), 0U) << "no slot holds the tensors";
  for (auto& byte : tensors.bytes(1)) byte = 0;
  sf_read_stats stats{};
  stats.struct_bytes = sizeof stats;
  ASSERT_EQ(restore(tensors, session_, &stats), SF_OK) << error_.message;
  EXPECT_EQ(stats.from_memory, 0);
  EXPECT_EQ(tensors.all(), saved);
}

TEST_F(Restore, reads_only_the_extents_that_the_targets_need) {
  start_daemon();
  ByteTensors tensors({40 * kMiB, 10, 30 * kMiB});
  attach(tensors);
  save(tensors);
  ASSERT_FALSE(HasFatalFailure());
  sf_checkpoint* checkpoint = nullptr;
  ASSERT_EQ(sf_checkpoint_open(run_path().c_str(), "1", nullptr, &checkpoint, &error_), SF_OK);
  auto targets = tensors.targets();
  sf_read_stats stats{};
  stats.struct_bytes = sizeof stats;
  ASSERT_EQ(sf_checkpoint_read(checkpoint, &targets[1], 1, &stats, &error_), SF_OK);
  EXPECT_LE(stats.bytes, kMiB);
  ASSERT_EQ(sf_checkpoint_read(checkpoint, targets.data(), 0, &stats, &error_), SF_OK);
  EXPECT_EQ(stats.bytes, 0U);

  std::swap(targets[0], targets[2]);
  EXPECT_EQ(sf_checkpoint_read(checkpoint, targets.data(), 3, &stats, &error_), SF_OK)
      << "in any order";
  targets[1] = targets[0];
  EXPECT_EQ(sf_checkpoint_read(checkpoint, targets.data(), 3, nullptr, &error_),
            SF_INVALID_ARGUMENT);
  targets[1].name = "no such tensor";
  EXPECT_EQ(sf_checkpoint_read(checkpoint, targets.data(), 3, nullptr, &error_),
            SF_INVALID_ARGUMENT);
  targets[0].bytes -= 1;
  EXPECT_EQ(sf_checkpoint_read(checkpoint, targets.data(), 1, nullptr, &error_),
            SF_INVALID_ARGUMENT);
  EXPECT_NE(std::string(sf_checkpoint_header(checkpoint, 0)).find("tensor.1"), std::string::npos);
  EXPECT_EQ(sf_checkpoint_header(checkpoint, 1), nullptr);
  EXPECT_EQ(std::string(sf_checkpoint_manifest(checkpoint)).front(), '{');
  std::uint64_t bytes = 0;
  EXPECT_STREQ(sf_checkpoint_state(checkpoint, &bytes), "{\"format_version\": 1}");
  EXPECT_EQ(bytes, 21U);
  sf_checkpoint_close(checkpoint);
}

TEST_F(Restore, names_the_extent_that_is_damaged_and_takes_the_rest) {
  start_daemon();
  ByteTensors tensors({30 * kMiB, 3 * kMiB});
  attach(tensors);
  save(tensors);
  ASSERT_FALSE(HasFatalFailure());
  damage(17 * kMiB + 1);
  EXPECT_EQ(restore(tensors), SF_DATA_LOSS);
  EXPECT_NE(std::string(error_.message).find("model.safetensors extent 17 (offset 17825792"),
            std::string::npos)
      << error_.message;
  sf_checkpoint* checkpoint = nullptr;
  ASSERT_EQ(sf_checkpoint_open(run_path().c_str(), "latest", nullptr, &checkpoint, &error_), SF_OK);
  const auto targets = tensors.targets();
  EXPECT_EQ(sf_checkpoint_read(checkpoint, &targets[1], 1, nullptr, &error_), SF_OK)
      << error_.message;
  EXPECT_EQ(sf_checkpoint_read(checkpoint, &targets[0], 1, nullptr, &error_), SF_DATA_LOSS);
  sf_checkpoint_close(checkpoint);

  sf_read_stats stats{};
  stats.struct_bytes = sizeof stats;
  EXPECT_EQ(restore(tensors, session_, &stats), SF_OK) << "memory still has it";
  EXPECT_EQ(stats.from_memory, 1);
}

TEST_F(Restore, says_what_there_is_when_nothing_is_found) {
  ByteTensors tensors({1});
  EXPECT_EQ(restore(tensors), SF_NOT_FOUND);
  EXPECT_NE(error_.message[0], '\0');
  sf_checkpoint* checkpoint = nullptr;
  EXPECT_EQ(sf_checkpoint_open(run_path().c_str(), "../x", nullptr, &checkpoint, &error_),
            SF_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace stillframe::testing
