// Tensors of GPUs through the public C ABI and a real daemon. Knows nothing of the driver: built
// twice, for the simulated one and for a real GPU (scripts/gpu-bundle).
#include <dlfcn.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "tests/format/seed.h"
#include "tests/support/gpu_lane.h"

namespace stillframe::testing {
namespace {

TEST_F(GpuLane, of_tensors_on_two_gpus_and_the_host_is_restored_bit_for_bit) {
  auto& trainer = train(GpuTrainer::mixed_tensors());
  for (const std::int64_t step : {1, 2, 3}) {
    trainer.fill(step);
    ASSERT_EQ(trainer.save_durable(step), SF_OK) << trainer.error().message;
    EXPECT_EQ(trainer.judge_newest(step), "");
  }
  EXPECT_NE(trainer.describe().find("\"lane\": \"pinned\""), std::string::npos)
      << trainer.describe();
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuLane, lazily_holds_what_the_streams_had_done_and_nothing_later) {
  auto& trainer = train(GpuTrainer::mixed_tensors());
  trainer.fill(0);
  for (std::int64_t step = 0; step < 6; ++step) {
    ASSERT_NO_FATAL_FAILURE(save_beside_training(trainer, step));
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuLane, takes_its_place_in_a_stream_that_is_far_behind) {
  auto& trainer = train({{.place = Place::kGpu0, .bytes = 1'500'000, .is_lazy = true},
                         {.place = Place::kGpu0, .bytes = 200'000},
                         {.place = Place::kGpu0, .bytes = 900'000, .is_lazy = true},
                         {.place = Place::kGpu0, .bytes = 30}});
  for (std::int64_t step = 0; step < 6; ++step) {
    for (std::int64_t other = 100; other < 110; ++other) trainer.fill(other);
    trainer.fill(step);
    ASSERT_NO_FATAL_FAILURE(save_beside_training(trainer, step));
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuLane, of_any_layout_is_restored_bit_for_bit) {
  auto random = format::seeded_generator();
  using format::pick;
  std::vector<Tensor> tensors;
  for (int i = 0; i < 60; ++i) {
    const Place place = std::array{Place::kHost, Place::kGpu0, Place::kGpu1}[pick(random, 3)];
    const std::uint64_t size_class = pick(random, 4);
    const std::uint64_t bytes = size_class == 0   ? pick(random, 20)
                                : size_class == 1 ? pick(random, 5'000)
                                : size_class == 2 ? pick(random, 100'000)
                                                  : pick(random, 400'000);
    const bool is_strided = pick(random, 6) == 0 && bytes >= 16;
    tensors.push_back({.place = place,
                       .bytes = is_strided ? bytes / 8 * 8 : bytes,
                       .is_lazy = pick(random, 2) == 0,
                       .is_strided = is_strided,
                       .misalignment = pick(random, 17)});
  }
  auto& trainer = train(std::move(tensors));
  trainer.fill(5);
  ASSERT_EQ(trainer.save_durable(5), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(5), "");
  ASSERT_NO_FATAL_FAILURE(save_beside_training(trainer, 5));
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuLane, of_many_chunks_is_restored_bit_for_bit) {
  for (const std::uint64_t window_bytes : {std::uint64_t{2} << 20, std::uint64_t{1}}) {
    auto& trainer = train({{.place = Place::kGpu0, .bytes = 5'000'000, .is_lazy = true},
                           {.place = Place::kHost, .bytes = 1'100'000, .is_lazy = true},
                           {.place = Place::kGpu1, .bytes = 300'000, .is_lazy = true},
                           {.place = Place::kGpu0, .bytes = 4'000'000, .is_lazy = true}},
                          window_bytes);
    trainer.fill(0);
    for (std::int64_t step = 0; step < 3; ++step) {
      ASSERT_NO_FATAL_FAILURE(save_beside_training(trainer, step));
    }
    EXPECT_EQ(trainer.close(), SF_OK);
  }
}

TEST_F(GpuLane, that_is_voided_leaves_the_gpus_idle_and_the_next_save_works) {
  auto& trainer = train(GpuTrainer::mixed_tensors());
  trainer.fill(1);
  std::uint64_t ticket = 0;
  ASSERT_EQ(trainer.begin_save(1, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
  sf_error error{};
  ASSERT_EQ(sf_capture_void(trainer.session(), ticket, 0, "no longer wanted", &error), SF_OK);
  EXPECT_EQ(trainer.wait_durable(ticket), SF_CANCELLED);
  trainer.fill(2);
  ASSERT_EQ(trainer.save_durable(2), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(2), "");
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuLane, that_is_voided_reads_no_memory_any_more) {
  for (int round = 0; round < 8; ++round) {
    auto& trainer = train({{.place = Place::kGpu0, .bytes = 1'500'000, .is_lazy = true},
                           {.place = Place::kGpu1, .bytes = 1'500'000, .is_lazy = true}});
    trainer.fill(round);
    trainer.wait_gpus();
    std::uint64_t ticket = 0;
    ASSERT_EQ(trainer.begin_save(round, SF_CAPTURE_LAZY, &ticket), SF_OK)
        << trainer.error().message;
    std::this_thread::sleep_for(std::chrono::milliseconds(round));
    sf_error error{};
    ASSERT_EQ(sf_capture_void(trainer.session(), ticket, 0, "no longer wanted", &error), SF_OK);
    trainer.free_tensor(0);
    trainer.free_tensor(1);
    EXPECT_EQ(trainer.close(), SF_OK);
  }
}

TEST_F(GpuLane, outlives_the_daemon) {
  auto& trainer = train(GpuTrainer::mixed_tensors());
  trainer.fill(1);
  std::uint64_t ticket = 0;
  ASSERT_EQ(trainer.begin_save(1, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
  daemon_->kill_now();
  EXPECT_EQ(trainer.publish(ticket), SF_UNAVAILABLE);
  daemon_.emplace(directory_.path("socket"));
  ASSERT_TRUE(daemon_->wait_listening());
  trainer.fill(2);
  ASSERT_EQ(trainer.save_durable(2), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(2), "");
  EXPECT_EQ(trainer.close(), SF_OK);
}

// The environment, with this program's own driver found first.
std::vector<std::string> environment_of_trainer() {
  std::vector<std::string> variables;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (!std::string(*entry).starts_with("LD_LIBRARY_PATH=")) variables.emplace_back(*entry);
  }
  char folder[PATH_MAX] = {};
  void* const driver = ::dlopen("libcuda.so.1", RTLD_LAZY);
  check(driver != nullptr && ::dlinfo(driver, RTLD_DI_ORIGIN, folder) == 0, "there is a driver");
  variables.push_back(std::string("LD_LIBRARY_PATH=") + folder);
  return variables;
}

// gpu_crash_trainer, which lies beside this program, until a moment after its first durable save.
struct Killed {
  std::int64_t begun = -1;
  std::int64_t durable = -1;
};
Killed run_and_kill(const std::string& run_path, const std::string& socket_path,
                    std::int64_t first_step, std::chrono::microseconds after) {
  std::string program =
      (std::filesystem::read_symlink("/proc/self/exe").parent_path() / "gpu_crash_trainer")
          .string();
  std::string run = run_path;
  std::string socket = socket_path;
  std::string step = std::to_string(first_step);
  char* argv[] = {program.data(), run.data(), socket.data(), step.data(), nullptr};
  std::vector<std::string> variables = environment_of_trainer();
  std::vector<char*> envp;
  for (std::string& variable : variables) envp.push_back(variable.data());
  envp.push_back(nullptr);
  int ends[2] = {};
  check(::pipe2(ends, O_CLOEXEC) == 0, "a pipe");
  posix_spawn_file_actions_t actions;
  (void)::posix_spawn_file_actions_init(&actions);
  (void)::posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
  pid_t pid = -1;
  check(::posix_spawn(&pid, program.c_str(), &actions, nullptr, argv, envp.data()) == 0,
        "the trainer starts");
  (void)::posix_spawn_file_actions_destroy(&actions);
  (void)::close(ends[1]);
  Killed killed;
  std::FILE* const lines = ::fdopen(ends[0], "r");
  char word[16] = {};
  long long said = 0;
  bool is_killed = false;
  while (std::fscanf(lines, "%15s %lld", word, &said) == 2) {
    if (std::string(word) == "begin") killed.begun = said;
    if (std::string(word) != "durable") continue;
    killed.durable = said;
    if (std::exchange(is_killed, true)) continue;
    std::this_thread::sleep_for(after);
    (void)::kill(pid, SIGKILL);
  }
  std::fclose(lines);
  (void)::waitpid(pid, nullptr, 0);
  return killed;
}

TEST_F(GpuLane, of_a_trainer_that_is_killed_loses_only_the_save_it_was_in) {
  auto random = format::seeded_generator();
  const char* const wish = std::getenv("STILLFRAME_KILLS");
  const int round_count = wish != nullptr ? std::atoi(wish) : 6;
  std::int64_t step = 0;
  for (int round = 0; round < round_count; ++round) {
    const Killed killed = run_and_kill(directory_.path("run"), directory_.path("socket"), step,
                                       std::chrono::microseconds(format::pick(random, 60'000)));
    ASSERT_GE(killed.durable, step) << "round " << round;
    // The next one takes the run over, and waits for what was captured.
    auto& trainer = train(GpuTrainer::mixed_tensors());
    ASSERT_EQ(sf_session_settle(trainer.session(), 10'000, nullptr), SF_OK);
    std::string complaint = "no checkpoint";
    for (step = killed.durable; step <= killed.begun && !complaint.empty(); ++step) {
      complaint = trainer.judge_newest(step);
    }
    ASSERT_EQ(complaint, "") << "round " << round << ", durable " << killed.durable << ", begun "
                             << killed.begun;
    step = killed.begun + 1;
    EXPECT_EQ(trainer.close(), SF_OK);
    trainer_.reset();
  }
  std::printf("killed %d trainers\n", round_count);
}

TEST_F(GpuLane, comes_back_to_the_gpus_from_memory_and_from_the_drive) {
  auto& trainer = train(GpuTrainer::mixed_tensors());
  trainer.fill(1);
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  for (const bool uses_memory : {true, false}) {
    // Work that is still on its way to the tensors when the restore begins.
    trainer.fill(2);
    sf_read_stats stats = {};
    ASSERT_EQ(trainer.restore_newest(uses_memory, &stats), SF_OK) << trainer.error().message;
    EXPECT_EQ(stats.from_memory, uses_memory ? 1 : 0);
    trainer.wait_gpus();
    EXPECT_EQ(trainer.find_other(1), "");
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_F(GpuLane, damaged_on_the_drive_never_reaches_a_gpu) {
  auto& trainer =
      train({{.place = Place::kGpu0, .bytes = 2'000'000}, {.place = Place::kGpu1, .bytes = 1'000}});
  trainer.fill(1);
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  const std::string file = directory_.path("run/00000001-step-1/model.safetensors");
  std::FILE* const opened = std::fopen(file.c_str(), "r+b");
  ASSERT_NE(opened, nullptr);
  ASSERT_EQ(std::fseek(opened, 1'500'000, SEEK_SET), 0);
  const int before = std::fgetc(opened);
  ASSERT_EQ(std::fseek(opened, 1'500'000, SEEK_SET), 0);
  std::fputc(before ^ 1, opened);
  std::fclose(opened);
  trainer.fill(2);
  trainer.wait_gpus();
  sf_read_stats stats = {};
  EXPECT_EQ(trainer.restore_newest(false, &stats), SF_DATA_LOSS) << trainer.error().message;
  trainer.wait_gpus();
  const std::vector<std::uint8_t> held = trainer.read_gpu(0);
  // The extent that is damaged begins behind 1 MiB of the file, 4 KiB of which are the header.
  const std::size_t damaged_from = (std::size_t{1} << 20) - 4096;
  for (std::size_t i = damaged_from; i < held.size(); ++i) {
    ASSERT_EQ(held[i], GpuTrainer::byte_at(2, 0, i)) << i;
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

}  // namespace
}  // namespace stillframe::testing
