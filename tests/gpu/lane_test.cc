// Tensors of GPUs through the public C ABI and a real daemon. Knows nothing of the driver: built
// twice, for the simulated one and for a real GPU (scripts/gpu-bundle).
#include <gtest/gtest.h>
#include <signal.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/format/seed.h"
#include "tests/support/gpu_crash.h"
#include "tests/support/gpu_lane.h"

namespace stillframe::testing {
namespace {

// Of tests that end something at a random instant.
int count_of_rounds() {
  const char* const wish = std::getenv("STILLFRAME_KILLS");
  return wish != nullptr ? std::atoi(wish) : kIsSanitized ? 2 : 6;
}

class EveryLane : public GpuLane, public ::testing::WithParamInterface<const char*> {
 protected:
  GpuTrainer& train(std::vector<Tensor> tensors, const Lane& wish = {}) {
    Lane lane = wish;
    lane.name = GetParam();
    return GpuLane::train(std::move(tensors), lane);
  }
  bool is_in_use() {
    const std::string wanted = std::string("\"lane\": \"") + GetParam() + '"';
    return trainer_->describe().find(wanted) != std::string::npos;
  }
};

TEST_P(EveryLane, of_tensors_on_two_gpus_and_the_host_is_restored_bit_for_bit) {
  auto& trainer = train(GpuTrainer::mixed_tensors());
  for (const std::int64_t step : {1, 2, 3}) {
    trainer.fill(step);
    ASSERT_EQ(trainer.save_durable(step), SF_OK) << trainer.error().message;
    EXPECT_EQ(trainer.judge_newest(step), "");
  }
  EXPECT_TRUE(is_in_use()) << trainer.describe();
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_P(EveryLane, lazily_holds_what_the_streams_had_done_and_nothing_later) {
  auto& trainer = train(GpuTrainer::mixed_tensors());
  trainer.fill(0);
  for (std::int64_t step = 0; step < 6; ++step) {
    ASSERT_NO_FATAL_FAILURE(save_beside_training(trainer, step));
  }
  // Where the streams are far behind, capture and update lie in them one behind the other.
  for (std::int64_t step = 6; step < 12; ++step) {
    trainer.delay();
    trainer.fill(step);
    std::uint64_t ticket = 0;
    ASSERT_EQ(trainer.begin_save(step, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
    ASSERT_EQ(trainer.fence(ticket), SF_OK) << trainer.error().message;
    trainer.spoil();
    ASSERT_EQ(trainer.publish(ticket), SF_OK) << trainer.error().message;
    ASSERT_EQ(trainer.wait_durable(ticket), SF_OK) << trainer.error().message;
    ASSERT_EQ(trainer.judge_newest(step), "") << "step " << step;
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

// By work that no fence holds. Of the small ones every block is set aside, of the large ones all is
// compared.
TEST_P(EveryLane, of_tensors_that_change_meanwhile_fails_or_holds_what_they_were) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "it is a race, which TSan finds in the simulated driver";
#endif
  for (const auto& [bytes, check] :
       {std::pair(400'000, SF_CHECK_SAMPLE), std::pair(3'500'000, SF_CHECK_FULL)}) {
    const auto size = static_cast<std::uint64_t>(bytes);
    auto& trainer = train({{.place = Place::kGpu0, .bytes = size, .is_lazy = true},
                           {.place = Place::kGpu0, .bytes = 0},
                           {.place = Place::kGpu1, .bytes = 5'000, .is_lazy = true},
                           {.place = Place::kGpu0, .bytes = size, .is_lazy = true}});
    int torn_count = 0;
    int round_count = 0;
    // Until one is torn, which a quick capture escapes.
    for (; round_count < 100 && (round_count < (kIsSanitized ? 5 : 20) || torn_count == 0);
         ++round_count) {
      const std::int64_t step = round_count;
      // The capture and the write are both enqueued when the stream gets there.
      trainer.delay();
      trainer.fill(step);
      std::uint64_t ticket = 0;
      ASSERT_EQ(trainer.begin_save(step, SF_CAPTURE_LAZY, &ticket, check), SF_OK)
          << trainer.error().message;
      trainer.spoil();
      if (trainer.publish(ticket) == SF_OK) {
        ASSERT_EQ(trainer.wait_durable(ticket), SF_OK) << trainer.error().message;
        ASSERT_EQ(trainer.judge_newest(step), "");
        continue;
      }
      ++torn_count;
      const std::string reason = trainer.error().message;
      EXPECT_NE(reason.find("changed while it was captured"), std::string::npos) << reason;
      EXPECT_EQ(trainer.wait_durable(ticket), SF_DATA_LOSS);
    }
    std::printf("%d of %d captures torn\n", torn_count, round_count);
    EXPECT_GT(torn_count, 0);
    // With a fence nothing is.
    trainer.fill(1);
    std::uint64_t ticket = 0;
    ASSERT_EQ(trainer.begin_save(1, SF_CAPTURE_LAZY, &ticket, check), SF_OK);
    ASSERT_EQ(trainer.fence(ticket), SF_OK) << trainer.error().message;
    trainer.fill(2);
    ASSERT_EQ(trainer.publish(ticket), SF_OK) << trainer.error().message;
    ASSERT_EQ(trainer.wait_durable(ticket), SF_OK) << trainer.error().message;
    EXPECT_EQ(trainer.judge_newest(1), "");
    EXPECT_EQ(trainer.close(), SF_OK);
  }
}

TEST_P(EveryLane, takes_its_place_in_a_stream_that_is_far_behind) {
  auto& trainer = train({{.place = Place::kGpu0, .bytes = 1'500'000, .is_lazy = true},
                         {.place = Place::kGpu0, .bytes = 200'000},
                         {.place = Place::kGpu0, .bytes = 900'000, .is_lazy = true},
                         {.place = Place::kGpu0, .bytes = 30}});
  // When each slot has had its turn, nothing is allocated any more, for which a driver may wait.
  std::int64_t step = 0;
  trainer.fill(step);
  for (; step < 2; ++step) ASSERT_NO_FATAL_FAILURE(save_beside_training(trainer, step));
  for (; step < 8; ++step) {
    trainer.wait_gpus();
    trainer.fill(100 + step);
    trainer.stop();
    trainer.fill(step);
    std::uint64_t ticket = 0;
    ASSERT_EQ(trainer.begin_save(step, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
    // What does not wait for the stream has its turn now.
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    trainer.go_on();
    ASSERT_NO_FATAL_FAILURE(end_beside_training(trainer, step, ticket));
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_P(EveryLane, of_any_layout_is_restored_bit_for_bit) {
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

TEST_P(EveryLane, of_many_chunks_is_restored_bit_for_bit) {
  // Two extents of window or ring, and none of a window or five of a ring.
  for (const Lane& lane : {Lane{.window_bytes = 2U << 20U, .ring_bytes = 2U << 20U},
                           Lane{.window_bytes = 1, .ring_bytes = 5U << 20U}}) {
    auto& trainer = train({{.place = Place::kGpu0, .bytes = 5'000'000, .is_lazy = true},
                           {.place = Place::kHost, .bytes = 1'100'000, .is_lazy = true},
                           {.place = Place::kGpu1, .bytes = 300'000, .is_lazy = true},
                           {.place = Place::kGpu0, .bytes = 4'000'000, .is_lazy = true}},
                          lane);
    trainer.fill(0);
    for (std::int64_t step = 0; step < 3; ++step) {
      ASSERT_NO_FATAL_FAILURE(save_beside_training(trainer, step));
    }
    EXPECT_EQ(trainer.close(), SF_OK);
  }
}

TEST_P(EveryLane, follows_tensors_that_move) {
  std::vector<Tensor> tensors = GpuTrainer::mixed_tensors();
  tensors[3].allocator = GpuTrainer::Allocator::kShareable;
  tensors[8].allocator = GpuTrainer::Allocator::kPieces;
  auto& trainer = train(std::move(tensors));
  for (std::int64_t step = 0; step < 4; ++step) {
    trainer.fill(step);
    ASSERT_NO_FATAL_FAILURE(save_beside_training(trainer, step));
    trainer.wait_gpus();
    trainer.move_tensors();
  }
  EXPECT_TRUE(is_in_use()) << trainer.describe();
  EXPECT_EQ(trainer.close(), SF_OK);
}

// As a framework's allocator makes them that maps memory page by page.
TEST_P(EveryLane, of_memory_with_descriptors_is_restored_bit_for_bit) {
  for (const auto allocator : {GpuTrainer::Allocator::kShareable, GpuTrainer::Allocator::kPieces}) {
    std::vector<Tensor> tensors = GpuTrainer::mixed_tensors();
    // More than one piece.
    const std::uint64_t bytes = kIsSanitized ? 2'200'001 : 5'000'001;
    tensors.push_back({.place = Place::kGpu0, .bytes = bytes, .is_lazy = true});
    for (Tensor& tensor : tensors) tensor.allocator = allocator;
    auto& trainer = train(std::move(tensors));
    trainer.fill(0);
    for (std::int64_t step = 0; step < 3; ++step) {
      ASSERT_NO_FATAL_FAILURE(save_beside_training(trainer, step));
    }
    EXPECT_TRUE(is_in_use()) << trainer.describe();
    EXPECT_EQ(trainer.close(), SF_OK);
    trainer_.reset();
  }
}

TEST_P(EveryLane, of_memory_that_is_private_is_captured_as_well) {
  auto& trainer = train({{.place = Place::kGpu0,
                          .bytes = 1'500'000,
                          .is_lazy = true,
                          .allocator = GpuTrainer::Allocator::kPrivate},
                         {.place = Place::kGpu0, .bytes = 20'000, .is_lazy = true}});
  trainer.fill(1);
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(1), "");
  if (std::string(GetParam()) == "ipc") {
    EXPECT_NE(trainer.describe().find("no other process can open"), std::string::npos)
        << trainer.describe();
    EXPECT_FALSE(is_in_use());
  } else {
    EXPECT_TRUE(is_in_use()) << trainer.describe();
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_P(EveryLane, that_is_voided_leaves_the_gpus_idle_and_the_next_save_works) {
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

TEST_P(EveryLane, that_is_voided_reads_no_memory_any_more) {
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

TEST_P(EveryLane, on_a_gpu_without_memory_works_or_says_why) {
  auto& trainer = train(GpuTrainer::mixed_tensors());
  trainer.take_memory();
  trainer.fill(1);
  if (trainer.save_durable(1) == SF_OK) {
    EXPECT_EQ(trainer.judge_newest(1), "");
  } else {
    std::printf("%s\n", trainer.error().message);
    EXPECT_NE(std::string(trainer.error().message), "");
  }
  trainer.let_memory_go();
  trainer.fill(2);
  ASSERT_EQ(trainer.save_durable(2), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(2), "");
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_P(EveryLane, outlives_the_daemon) {
  auto& trainer = train(GpuTrainer::mixed_tensors());
  trainer.fill(1);
  std::uint64_t ticket = 0;
  ASSERT_EQ(trainer.begin_save(1, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
  daemon_->kill_now();
  EXPECT_EQ(trainer.publish(ticket), SF_UNAVAILABLE);
  start_daemon();
  trainer.fill(2);
  ASSERT_EQ(trainer.save_durable(2), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.judge_newest(2), "");
  EXPECT_TRUE(is_in_use()) << trainer.describe();
  EXPECT_EQ(trainer.close(), SF_OK);
}

// One after the other on the same run, each ended at a random instant of its saves.
class CrashingTrainer : public EveryLane {
 protected:
  struct Ended {
    std::int64_t begun = -1;
    std::int64_t durable = -1;
  };

  GpuCrashTrainer::Setting setting(bool breaks) {
    return {.run_path = directory_.path("run"),
            .socket_path = directory_.path("socket"),
            .first_step = step_,
            .lane = GetParam(),
            .driver_folder = driver_folder(),
            .breaks = breaks};
  }
  // The next one takes the run over, and waits for what was captured.
  void take_over(const Ended& ended) {
    ASSERT_GE(ended.durable, step_);
    auto& trainer = train(GpuTrainer::mixed_tensors());
    ASSERT_EQ(sf_session_settle(trainer.session(), 10'000, nullptr), SF_OK);
    std::string complaint = "no checkpoint";
    for (std::int64_t step = ended.durable; step <= ended.begun && !complaint.empty(); ++step) {
      complaint = trainer.judge_newest(step);
    }
    ASSERT_EQ(complaint, "") << "durable " << ended.durable << ", begun " << ended.begun;
    EXPECT_EQ(trainer.close(), SF_OK);
    trainer_.reset();
    step_ = ended.begun + 1;
  }

  std::int64_t step_ = 0;
};

TEST_P(CrashingTrainer, that_is_killed_loses_only_the_save_it_was_in) {
  auto random = format::seeded_generator();
  const int round_count = count_of_rounds();
  for (int round = 0; round < round_count; ++round) {
    GpuCrashTrainer child(setting(false));
    const auto after = std::chrono::microseconds(format::pick(random, 60'000));
    Ended ended;
    bool is_killed = false;
    while (const auto said = child.listen()) {
      if (said->word == "begin") ended.begun = said->step;
      if (said->word != "durable") continue;
      ended.durable = said->step;
      if (std::exchange(is_killed, true)) continue;
      std::this_thread::sleep_for(after);
      child.kill_now();
    }
    EXPECT_EQ(child.wait(), 128 + SIGKILL);
    ASSERT_NO_FATAL_FAILURE(take_over(ended)) << "round " << round;
  }
  std::printf("killed %d trainers\n", round_count);
}

// As an assertion of its own kernels does. The daemon and other processes know nothing of it.
TEST_P(CrashingTrainer, whose_gpu_breaks_ends_by_itself_and_loses_only_the_save_it_was_in) {
  const int round_count = count_of_rounds();
  int failed_count = 0;
  for (int round = 0; round < round_count; ++round) {
    GpuCrashTrainer child(setting(true));
    Ended ended;
    std::chrono::steady_clock::time_point broken;
    while (const auto said = child.listen()) {
      if (said->word == "begin" || said->word == "broken") ended.begun = said->step;
      if (said->word == "broken") broken = std::chrono::steady_clock::now();
      if (said->word == "durable") ended.durable = said->step;
      if (said->word == "failed") ++failed_count;
    }
    EXPECT_EQ(child.wait(), 0);
    EXPECT_LT(std::chrono::steady_clock::now() - broken,
              std::chrono::seconds(kIsSanitized ? 30 : 10));
    ASSERT_NO_FATAL_FAILURE(take_over(ended)) << "round " << round;
  }
  std::printf("broke %d GPUs of trainers, %d saves failed\n", round_count, failed_count);
}

TEST_P(EveryLane, comes_back_to_the_gpus_from_memory_and_from_the_drive) {
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

// So many that they are not copied one by one.
TEST_P(EveryLane, of_many_small_tensors_comes_back_from_memory_and_from_the_drive) {
  auto random = format::seeded_generator();
  using format::pick;
  std::vector<Tensor> tensors;
  for (int i = 0; i < 1'500; ++i) {
    const Place place = std::array{Place::kHost, Place::kGpu0, Place::kGpu1}[pick(random, 3)];
    // Some reach over a whole extent, so that one has few tensors between two that have many.
    tensors.push_back({.place = place,
                       .bytes = pick(random, 300) == 0 ? 1'200'000 : pick(random, 1'000),
                       .misalignment = pick(random, 17)});
  }
  auto& trainer = train(std::move(tensors));
  trainer.fill(1);
  ASSERT_EQ(trainer.save_durable(1), SF_OK) << trainer.error().message;
  for (const bool uses_memory : {true, false}) {
    trainer.fill(2);
    sf_read_stats stats = {};
    ASSERT_EQ(trainer.restore_newest(uses_memory, &stats), SF_OK) << trainer.error().message;
    EXPECT_EQ(stats.from_memory, uses_memory ? 1 : 0);
    trainer.wait_gpus();
    EXPECT_EQ(trainer.find_other(1), "");
  }
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_P(EveryLane, damaged_on_the_drive_never_reaches_a_gpu) {
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

INSTANTIATE_TEST_SUITE_P(Pinned, EveryLane, ::testing::Values("pinned"));
INSTANTIATE_TEST_SUITE_P(Hbm, EveryLane, ::testing::Values("hbm"));
INSTANTIATE_TEST_SUITE_P(Ipc, EveryLane, ::testing::Values("ipc"));
INSTANTIATE_TEST_SUITE_P(Pinned, CrashingTrainer, ::testing::Values("pinned"));
INSTANTIATE_TEST_SUITE_P(Hbm, CrashingTrainer, ::testing::Values("hbm"));
INSTANTIATE_TEST_SUITE_P(Ipc, CrashingTrainer, ::testing::Values("ipc"));

// --- The worker of a GPU -------------------------------------------------------------------------

class GpuWorker : public GpuLane, public ::testing::WithParamInterface<const char*> {
 protected:
  // Saves once, so that there is a worker; its pid.
  pid_t start_worker(GpuTrainer& trainer, std::int64_t step) {
    trainer.fill(step);
    EXPECT_EQ(trainer.save_durable(step), SF_OK) << trainer.error().message;
    EXPECT_EQ(trainer.judge_newest(step), "");
    const pid_t pid = worker_pid();
    EXPECT_GT(pid, 0) << trainer.describe();
    return pid;
  }
  // Until then the daemon may hand a client to the one that dies, whose save takes the other lane.
  void await_end_of(pid_t pid) {
    for (int i = 0; i < 500 && worker_pid() == pid; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_NE(worker_pid(), pid);
  }
  static std::string beside_this_program(const char* name) {
    return std::filesystem::read_symlink("/proc/self/exe").parent_path() / name;
  }
  static std::vector<Tensor> tensors_of_a_gpu() {
    const std::uint64_t part = kIsSanitized ? 3 : 1;
    return {{.place = Place::kGpu0, .bytes = 3'500'000 / part, .is_lazy = true},
            {.place = Place::kHost, .bytes = 4},
            {.place = Place::kGpu0, .bytes = 2'700'001 / part, .is_lazy = true}};
  }
};

TEST_P(GpuWorker, that_dies_between_saves_is_replaced_before_the_next) {
  auto& trainer = train(tensors_of_a_gpu(), {.name = GetParam()});
  const pid_t first = start_worker(trainer, 1);
  const auto begin = std::chrono::steady_clock::now();
  (void)::kill(first, SIGKILL);
  await_end_of(first);
  EXPECT_NE(start_worker(trainer, 2), first);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(kIsSanitized ? 10 : 2));
  EXPECT_NE(trainer.describe().find(std::string("\"lane\": \"") + GetParam()), std::string::npos)
      << trainer.describe();
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_P(GpuWorker, that_dies_during_a_copy_fails_that_save_within_a_second_and_no_other) {
  auto random = format::seeded_generator();
  const int round_count = count_of_rounds();
  int failed_count = 0;
  for (int round = 0; round < round_count; ++round) {
    // The daemon gives a GPU up whose worker dies again and again.
    if (round > 0) {
      daemon_->kill_now();
      start_daemon();
    }
    auto& trainer = train(tensors_of_a_gpu(), {.name = GetParam()});
    const pid_t pid = start_worker(trainer, 3 * round);
    trainer.fill(3 * round + 1);
    std::uint64_t ticket = 0;
    ASSERT_EQ(trainer.begin_save(3 * round + 1, SF_CAPTURE_LAZY, &ticket), SF_OK)
        << trainer.error().message;
    std::this_thread::sleep_for(std::chrono::microseconds(format::pick(random, 80'000)));
    (void)::kill(pid, SIGKILL);
    const auto begin = std::chrono::steady_clock::now();
    const int published = trainer.publish(ticket);
    const std::string reason = trainer.error().message;
    EXPECT_LT(std::chrono::steady_clock::now() - begin,
              std::chrono::seconds(kIsSanitized ? 10 : 1));
    if (published != SF_OK) {
      ++failed_count;
      EXPECT_EQ(published, SF_UNAVAILABLE);
      EXPECT_NE(reason.find("the GPU worker was lost"), std::string::npos) << reason;
      EXPECT_EQ(trainer.judge_newest(3 * round), "");
    } else {
      ASSERT_EQ(trainer.wait_durable(ticket), SF_OK);
      EXPECT_EQ(trainer.judge_newest(3 * round + 1), "");
    }
    await_end_of(pid);
    EXPECT_NE(start_worker(trainer, 3 * round + 2), pid);
    EXPECT_EQ(trainer.close(), SF_OK);
    trainer_.reset();
  }
  std::printf("killed %d workers, %d saves failed\n", round_count, failed_count);
}

TEST_P(GpuWorker, whose_gpu_breaks_fails_one_save_and_is_replaced) {
  auto random = format::seeded_generator();
  const int round_count = count_of_rounds();
  int failed_count = 0;
  for (int round = 0; round < round_count; ++round) {
    // Another one each time, for a worker of the daemon before may still look for its own.
    const std::string break_file = directory_.path("break") + std::to_string(round);
    daemon_->kill_now();
    start_daemon({{"CUDA_INJECTION64_PATH", beside_this_program("libgpu_breaker.so")},
                  {"STILLFRAME_BREAK_FILE", break_file}});
    auto& trainer = train(tensors_of_a_gpu(), {.name = GetParam()});
    std::int64_t step = 10 * round;
    const pid_t pid = start_worker(trainer, step);
    trainer.fill(++step);
    std::uint64_t ticket = 0;
    ASSERT_EQ(trainer.begin_save(step, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
    std::this_thread::sleep_for(std::chrono::microseconds(format::pick(random, 80'000)));
    std::ofstream(break_file).flush();
    bool is_lost = trainer.publish(ticket) != SF_OK || trainer.wait_durable(ticket) != SF_OK;
    // One that has nothing to do learns of it with the next save.
    while (!is_lost && step < 10 * round + 8 && worker_pid() == pid) {
      EXPECT_EQ(trainer.judge_newest(step), "");
      trainer.fill(++step);
      is_lost = trainer.save_durable(step) != SF_OK;
    }
    if (is_lost) {
      ++failed_count;
      const std::string reason = trainer.error().message;
      EXPECT_NE(reason.find("the GPU worker was lost"), std::string::npos) << reason;
      EXPECT_EQ(trainer.judge_newest(step - 1), "");
    }
    await_end_of(pid);
    EXPECT_NE(start_worker(trainer, step + 1), pid);
    EXPECT_EQ(trainer.close(), SF_OK);
    trainer_.reset();
  }
  std::printf("broke %d GPUs of workers, %d saves failed\n", round_count, failed_count);
  EXPECT_GT(failed_count, 0);
}

TEST_P(GpuWorker, that_is_stopped_does_not_hold_the_trainer_for_ever) {
  auto& trainer = train(tensors_of_a_gpu(), {.name = GetParam()});
  // Once for each slot, which a worker may take long for.
  const pid_t pid = start_worker(trainer, 1);
  EXPECT_EQ(start_worker(trainer, 2), pid);
  (void)::kill(pid, SIGSTOP);
  trainer.fill(3);
  std::uint64_t ticket = 0;
  ASSERT_EQ(trainer.begin_save(3, SF_CAPTURE_LAZY, &ticket), SF_OK) << trainer.error().message;
  EXPECT_EQ(trainer.fence(ticket), SF_OK) << trainer.error().message;
  trainer.fill(4);
  sf_error error{};
  EXPECT_EQ(sf_capture_wait(trainer.session(), ticket, 200, 1, &error), SF_TIMEOUT);
  if (std::string(GetParam()) == "hbm") {
    ASSERT_EQ(sf_capture_void(trainer.session(), ticket, 0, "it takes too long", &error), SF_OK);
  } else {
    // The trainer's streams wait for it, but not for ever.
    EXPECT_EQ(trainer.publish(ticket), SF_UNAVAILABLE);
    EXPECT_NE(std::string(trainer.error().message).find("said nothing for 5 s"), std::string::npos)
        << trainer.error().message;
  }
  trainer.wait_gpus();
  (void)::kill(pid, SIGKILL);
  await_end_of(pid);
  EXPECT_NE(start_worker(trainer, 5), pid);
  EXPECT_EQ(trainer.close(), SF_OK);
}

TEST_P(GpuWorker, ends_when_its_last_client_has_gone) {
  auto& trainer = train(tensors_of_a_gpu(), {.name = GetParam()});
  const pid_t pid = start_worker(trainer, 1);
  EXPECT_EQ(trainer.close(), SF_OK);
  trainer_.reset();
  for (int i = 0; i < 500 && ::kill(pid, 0) == 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_NE(::kill(pid, 0), 0);
  EXPECT_EQ(worker_pid(), 0);
}

TEST_P(GpuWorker, ends_with_the_daemon) {
  auto& trainer = train(tensors_of_a_gpu(), {.name = GetParam()});
  const pid_t pid = start_worker(trainer, 1);
  EXPECT_EQ(daemon_->stop(), 0);
  EXPECT_NE(::kill(pid, 0), 0);
}

TEST_P(GpuWorker, serves_several_trainers_at_once) {
  std::vector<std::unique_ptr<GpuTrainer>> trainers;
  for (int i = 0; i < 3; ++i) {
    trainers.push_back(std::make_unique<GpuTrainer>(directory_.path("run") + std::to_string(i),
                                                    directory_.path("socket"), tensors_of_a_gpu()));
    ASSERT_EQ(trainers.back()->attach({.name = GetParam(), .ring_bytes = 4U << 20U}), SF_OK);
  }
  for (std::int64_t step = 0; step < 3; ++step) {
    std::vector<std::uint64_t> tickets;
    for (auto& trainer : trainers) {
      trainer->fill(step);
      ASSERT_EQ(trainer->begin_save(step, SF_CAPTURE_LAZY, &tickets.emplace_back()), SF_OK);
    }
    for (std::size_t i = 0; i < trainers.size(); ++i) {
      ASSERT_EQ(trainers[i]->publish(tickets[i]), SF_OK) << trainers[i]->error().message;
      ASSERT_EQ(trainers[i]->wait_durable(tickets[i]), SF_OK);
      EXPECT_EQ(trainers[i]->judge_newest(step), "");
    }
  }
  for (auto& trainer : trainers) EXPECT_EQ(trainer->close(), SF_OK);
}

INSTANTIATE_TEST_SUITE_P(Hbm, GpuWorker, ::testing::Values("hbm"));
INSTANTIATE_TEST_SUITE_P(Ipc, GpuWorker, ::testing::Values("ipc"));

}  // namespace
}  // namespace stillframe::testing
