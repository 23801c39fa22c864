// Saves through a real daemon: eager, lazy, torn, voided, refused.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "client/libstillframe.h"
#include "tests/client/test_session.h"

extern "C" int stillframe_c_compiles(void);

namespace stillframe::testing {
namespace {

class Save : public SessionTest {};

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

TEST(Header, compiles_as_c_and_links) { EXPECT_EQ(stillframe_c_compiles(), 0); }

TEST_F(Save, an_eager_one_is_captured_on_return_and_restored_bit_for_bit) {
  start_daemon();
  ByteTensors tensors({3 * kMiB + 17, 0, 1, 4096, 70'001});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(begin({.step = 7}, tensors.sources(true)), SF_OK) << error_.message;
  const auto saved = tensors.all();
  EXPECT_GE(ticket_info().state, SF_CAPTURED);
  for (std::size_t i = 0; i < saved.size(); ++i) {
    for (auto& byte : tensors.bytes(i)) byte = 99;  // SNAP-1: from CAPTURED on all may change.
  }
  ASSERT_EQ(wait_durable(), SF_OK) << error_.message;

  const sf_ticket info = ticket_info();
  EXPECT_EQ(info.state, SF_DURABLE);
  EXPECT_EQ(info.step, 7);
  EXPECT_EQ(info.sequence, 1U);
  EXPECT_GT(info.bytes, 3 * kMiB);
  EXPECT_LE(info.begin_ns, info.accepted_ns);
  EXPECT_LE(info.accepted_ns, info.captured_ns);
  EXPECT_LE(info.captured_ns, info.durable_ns);
  EXPECT_GT(info.begin_call_ns, 0);
  ASSERT_EQ(restore(tensors), SF_OK) << error_.message;
  EXPECT_EQ(tensors.all(), saved);
}

TEST_F(Save, a_lazy_one_copies_eager_tensors_before_it_returns_and_lazy_ones_until_published) {
  start_daemon();
  ByteTensors tensors({5 * kMiB + 1, 9000, 2 * kMiB, 3});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  const auto saved = tensors.all();
  auto sources = tensors.sources(true);
  sources[1].lazy = 0;
  sources[3].lazy = 0;
  ASSERT_EQ(begin({.capture = SF_CAPTURE_LAZY, .check = SF_CHECK_FULL}, sources), SF_OK)
      << error_.message;
  for (const std::size_t eager : {1U, 3U}) {
    for (auto& byte : tensors.bytes(eager)) byte = 77;  // SNAP-6
  }
  ASSERT_EQ(sf_capture_wait(session_, ticket_, 5000, 1, &error_), SF_OK) << error_.message;
  EXPECT_EQ(ticket_info().state, SF_ACCEPTED);
  ASSERT_EQ(sf_capture_publish(session_, ticket_, &error_), SF_OK) << error_.message;
  EXPECT_GE(ticket_info().state, SF_CAPTURED);
  EXPECT_EQ(sf_capture_publish(session_, ticket_, &error_), SF_OK) << "again is harmless";
  for (const std::size_t lazy : {0U, 2U}) {
    for (auto& byte : tensors.bytes(lazy)) byte = 78;
  }
  ASSERT_EQ(wait_durable(), SF_OK) << error_.message;
  EXPECT_GT(ticket_info().fence_wait_ns, 0);
  ASSERT_EQ(restore(tensors), SF_OK) << error_.message;
  EXPECT_EQ(tensors.all(), saved);
}

// SNAP-7: nobody bumped a version counter, and the comparison still finds it.
TEST_F(Save, a_lazy_tensor_that_changes_during_the_capture_fails_it_and_is_named) {
  start_daemon();
  ByteTensors tensors({2 * kMiB, 3 * kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(begin({.step = 1}, tensors.sources(true)), SF_OK) << error_.message;
  ASSERT_EQ(wait_durable(), SF_OK) << error_.message;

  for (const sf_check check : {SF_CHECK_FULL, SF_CHECK_SAMPLE}) {
    ASSERT_EQ(begin({.step = 2, .capture = SF_CAPTURE_LAZY, .check = check}, tensors.sources(true)),
              SF_OK)
        << error_.message;
    ASSERT_EQ(sf_capture_wait(session_, ticket_, 5000, 1, &error_), SF_OK) << error_.message;
    // The sample finds a change of every block; that of one byte only the full comparison.
    if (check == SF_CHECK_FULL) {
      tensors.bytes(1)[kMiB + 12'345] ^= 1;
    } else {
      for (auto& byte : tensors.bytes(1)) byte ^= 1;
    }
    EXPECT_EQ(sf_capture_publish(session_, ticket_, &error_), SF_DATA_LOSS);
    EXPECT_NE(std::string(error_.message).find("tensor.1"), std::string::npos) << error_.message;
    EXPECT_EQ(wait_durable(), SF_DATA_LOSS) << "waiting tells the failure too";
    EXPECT_EQ(ticket_info().state, SF_FAILED);
    EXPECT_EQ(ticket_info().failure.code, SF_DATA_LOSS);
    EXPECT_EQ(sf_capture_publish(session_, ticket_, &error_), SF_DATA_LOSS);
  }
  ASSERT_EQ(begin({.step = 3}, tensors.sources(true)), SF_OK) << error_.message;
  ASSERT_EQ(wait_durable(), SF_OK) << error_.message;
  char* json = nullptr;
  ASSERT_EQ(sf_run_list(run_path().c_str(), &json, &error_), SF_OK);
  const std::string list = json;
  sf_free(json);
  EXPECT_EQ(list.find("\"step\": 2"), std::string::npos) << list;
  EXPECT_NE(list.find("\"step\": 3"), std::string::npos) << list;
}

TEST_F(Save, a_voided_capture_fails_the_save_with_the_reason_and_the_next_one_works) {
  start_daemon();
  ByteTensors tensors({8 * kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  for (const int torn : {0, 1}) {
    ASSERT_EQ(begin({.capture = SF_CAPTURE_LAZY}, tensors.sources(true)), SF_OK) << error_.message;
    ASSERT_EQ(sf_capture_void(session_, ticket_, torn, "the fence was late", &error_), SF_OK);
    for (auto& byte : tensors.bytes(0)) ++byte;  // Nobody reads it any more (TSan knows).
    EXPECT_EQ(wait_durable(), torn != 0 ? SF_DATA_LOSS : SF_CANCELLED);
    EXPECT_STREQ(error_.message, "the fence was late");
    EXPECT_EQ(sf_capture_void(session_, ticket_, torn, "again", &error_), SF_OK);
  }
  ASSERT_EQ(begin({}, tensors.sources(true)), SF_OK) << error_.message;
  EXPECT_EQ(wait_durable(), SF_OK) << error_.message;
}

TEST_F(Save, the_next_one_leaves_the_slot_that_is_still_being_written_alone) {
  start_daemon({{"STILLFRAME_STEP_ONLY", "C4 write"},
                {"STILLFRAME_STEP_AT", "1"},
                {"STILLFRAME_STEP_DO", "sleep:300"}});
  ByteTensors tensors({2 * kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(begin({.step = 1}, tensors.sources(false)), SF_OK) << error_.message;
  const std::uint64_t first = ticket_;
  for (auto& byte : tensors.bytes(0)) ++byte;
  ASSERT_EQ(begin({.step = 2}, tensors.sources(false)), SF_OK) << error_.message;
  EXPECT_EQ(sf_ticket_wait(session_, first, SF_DURABLE, 20'000, &error_), SF_OK) << error_.message;
  EXPECT_EQ(wait_durable(), SF_OK) << error_.message;
}

TEST_F(Save, a_second_capture_is_refused_while_one_is_open) {
  start_daemon();
  ByteTensors tensors({kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(begin({.capture = SF_CAPTURE_LAZY}, tensors.sources(true)), SF_OK);
  const std::uint64_t first = ticket_;
  EXPECT_EQ(begin({}, tensors.sources(true)), SF_INVALID_ARGUMENT);
  const sf_part part = tensors.part("other");
  EXPECT_EQ(sf_layout_register(session_, &part, 1, 1000, &error_), SF_INVALID_ARGUMENT);
  ASSERT_EQ(sf_capture_wait(session_, first, 5000, 0, &error_), SF_OK) << error_.message;
  ASSERT_EQ(sf_capture_publish(session_, first, &error_), SF_OK) << error_.message;
  ticket_ = first;
  EXPECT_EQ(wait_durable(), SF_OK) << error_.message;
}

TEST_F(Save, refuses_what_does_not_fit_the_layout_and_says_why) {
  start_daemon();
  ByteTensors tensors({kMiB, 10});
  attach();
  ASSERT_FALSE(HasFatalFailure());
  EXPECT_EQ(begin({}, tensors.sources(false)), SF_INVALID_ARGUMENT) << "no layout yet";
  const sf_part part = tensors.part();
  ASSERT_EQ(sf_layout_register(session_, &part, 1, 10'000, &error_), SF_OK) << error_.message;
  auto sources = tensors.sources(false);
  sources.pop_back();
  EXPECT_EQ(begin({}, sources), SF_INVALID_ARGUMENT);
  sources = tensors.sources(false);
  sources[1].data = nullptr;
  EXPECT_EQ(begin({}, sources), SF_INVALID_ARGUMENT);
  EXPECT_NE(std::string(error_.message).find("tensor.1"), std::string::npos) << error_.message;
  EXPECT_EQ(begin({.step = -1}, tensors.sources(false)), SF_INVALID_ARGUMENT);
  EXPECT_EQ(begin({}, tensors.sources(false)), SF_OK) << "nothing was held: " << error_.message;
  EXPECT_EQ(wait_durable(), SF_OK) << error_.message;
}

TEST_F(Save, an_arena_above_the_configured_cap_is_refused_with_the_amounts) {
  start_daemon();
  sf_attach_options options = attach_options();
  options.arena_bytes_max = kMiB;
  ASSERT_EQ(sf_attach(&options, &session_, &error_), SF_OK) << error_.message;
  ByteTensors large({5 * kMiB});
  const sf_part part = large.part();
  EXPECT_EQ(sf_layout_register(session_, &part, 1, 10'000, &error_), SF_RESOURCE_EXHAUSTED);
  EXPECT_NE(std::string(error_.message).find("(configured)"), std::string::npos) << error_.message;
}

// Without a driver, or with one that does not know the address.
TEST_F(Save, what_is_said_to_be_a_gpus_and_is_not_is_refused_and_the_next_save_works) {
  start_daemon();
  ByteTensors tensors({1000, 2000});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  std::vector<sf_source> sources = tensors.sources(true);
  sources[1].memory = SF_MEMORY_CUDA;
  const int refused = begin({.capture = SF_CAPTURE_LAZY}, sources);
  EXPECT_TRUE(refused == SF_UNAVAILABLE || refused == SF_INVALID_ARGUMENT) << refused;
  const std::string message = error_.message;
  EXPECT_TRUE(message.find("NVIDIA driver") != std::string::npos ||
              message.find("tensor.1 is not in a GPU's memory") != std::string::npos)
      << message;
  sources[1].memory = 7;
  EXPECT_EQ(begin({.capture = SF_CAPTURE_LAZY}, sources), SF_INVALID_ARGUMENT);
  EXPECT_NE(std::string(error_.message).find("tensor.1 is no sf_memory"), std::string::npos)
      << error_.message;
  ASSERT_EQ(begin({.capture = SF_CAPTURE_EAGER}, tensors.sources(false)), SF_OK) << error_.message;
  EXPECT_EQ(wait_durable(), SF_OK) << error_.message;
}

TEST_F(Save, strided_sources_and_targets_hold_the_same_elements) {
  start_daemon();
  // A 512 x 300 matrix of F32 that is saved transposed, eagerly and lazily, and read back both
  // ways.
  constexpr std::uint64_t kRows = 512;
  constexpr std::uint64_t kColumns = 300;
  std::vector<float> matrix(kRows * kColumns);
  for (std::size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<float>(i) * 0.5F;
  const std::uint64_t shape[] = {kColumns, kRows};
  const std::int64_t strides[] = {sizeof(float), kColumns * sizeof(float)};
  constexpr std::uint32_t kF32 = 14;
  const sf_tensor tensor{.name = "transposed", .shape = shape, .dimension_count = 2, .dtype = kF32};
  const sf_part part{.name = "model",
                     .tensors = &tensor,
                     .tensor_count = 1,
                     .metadata = nullptr,
                     .metadata_count = 0};
  attach();
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(sf_layout_register(session_, &part, 1, 10'000, &error_), SF_OK) << error_.message;
  for (const std::uint32_t lazy : {0U, 1U}) {
    const std::vector<sf_source> sources = {
        {.data = matrix.data(), .stride_bytes = strides, .lazy = lazy, .memory = SF_MEMORY_HOST}};
    ASSERT_EQ(begin({.capture = SF_CAPTURE_LAZY, .check = SF_CHECK_FULL}, sources), SF_OK);
    ASSERT_EQ(sf_capture_wait(session_, ticket_, 5000, 1, &error_), SF_OK) << error_.message;
    ASSERT_EQ(sf_capture_publish(session_, ticket_, &error_), SF_OK) << error_.message;
    ASSERT_EQ(wait_durable(), SF_OK) << error_.message;

    sf_checkpoint* checkpoint = nullptr;
    ASSERT_EQ(sf_checkpoint_open(run_path().c_str(), "latest", nullptr, &checkpoint, &error_),
              SF_OK);
    std::vector<float> packed(matrix.size());
    std::vector<float> scattered(matrix.size());
    for (const bool is_strided : {false, true}) {
      std::vector<float>& place = is_strided ? scattered : packed;
      const sf_target target{.part_index = 0,
                             .name = "transposed",
                             .data = place.data(),
                             .bytes = place.size() * sizeof(float),
                             .stride_bytes = is_strided ? strides : nullptr,
                             .memory = SF_MEMORY_HOST,
                             .reserved = 0};
      ASSERT_EQ(sf_checkpoint_read(checkpoint, &target, 1, nullptr, &error_), SF_OK)
          << error_.message;
    }
    sf_checkpoint_close(checkpoint);
    EXPECT_EQ(scattered, matrix);
    EXPECT_EQ(packed[kRows], matrix[1]);
    EXPECT_EQ(packed[1], matrix[kColumns]);
  }
}

TEST_F(Save, another_layout_takes_over_and_the_same_one_again_costs_nothing) {
  start_daemon();
  ByteTensors small({10'000});
  ByteTensors large({30 * kMiB});
  attach(small);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(begin({.step = 1}, small.sources(false)), SF_OK) << error_.message;
  for (ByteTensors* const tensors : {&large, &small, &large}) {
    const sf_part part = tensors->part();
    ASSERT_EQ(sf_layout_register(session_, &part, 1, 20'000, &error_), SF_OK) << error_.message;
    ASSERT_EQ(sf_layout_register(session_, &part, 1, 20'000, &error_), SF_OK) << error_.message;
    ASSERT_EQ(begin({.step = 2}, tensors->sources(false)), SF_OK) << error_.message;
    ASSERT_EQ(wait_durable(), SF_OK) << error_.message;
    const auto saved = tensors->all();
    for (auto& byte : tensors->bytes(0)) byte = 0;
    ASSERT_EQ(restore(*tensors), SF_OK) << error_.message;
    EXPECT_EQ(tensors->all(), saved);
  }
}

TEST_F(Save, tickets_are_known_until_64_newer_ones_came) {
  start_daemon();
  ByteTensors tensors({100});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(begin({}, tensors.sources(false)), SF_OK);
  const std::uint64_t first = ticket_;
  for (int i = 0; i < 64; ++i) {
    ASSERT_EQ(begin({}, tensors.sources(false)), SF_OK) << error_.message;
    ASSERT_EQ(wait_durable(), SF_OK) << error_.message;
  }
  sf_ticket info{};
  info.struct_bytes = sizeof info;
  EXPECT_EQ(sf_ticket_get(session_, first, &info, &error_), SF_INVALID_ARGUMENT);
  EXPECT_EQ(sf_ticket_get(session_, first + 1, &info, &error_), SF_OK);
  EXPECT_EQ(sf_ticket_wait(session_, 12'345, SF_DURABLE, 10, &error_), SF_INVALID_ARGUMENT);
}

TEST_F(Save, other_threads_may_wait_while_the_session_saves) {
  start_daemon();
  ByteTensors tensors({6 * kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  for (int i = 0; i < 10; ++i) {
    ASSERT_EQ(begin({.step = i, .capture = SF_CAPTURE_LAZY}, tensors.sources(true)), SF_OK)
        << error_.message;
    const std::uint64_t ticket = ticket_;
    std::thread captured(
        [&] { EXPECT_EQ(sf_ticket_wait(session_, ticket, SF_CAPTURED, 20'000, nullptr), SF_OK); });
    std::thread durable(
        [&] { EXPECT_EQ(sf_ticket_wait(session_, ticket, SF_DURABLE, 20'000, nullptr), SF_OK); });
    std::thread helper([&] {
      EXPECT_EQ(sf_capture_wait(session_, ticket, 20'000, 1, nullptr), SF_OK);
      sf_ticket info{};
      info.struct_bytes = sizeof info;
      EXPECT_EQ(sf_ticket_get(session_, ticket, &info, nullptr), SF_OK);
    });
    EXPECT_EQ(sf_capture_wait(session_, ticket, 20'000, 1, &error_), SF_OK) << error_.message;
    EXPECT_EQ(sf_capture_publish(session_, ticket, &error_), SF_OK) << error_.message;
    EXPECT_EQ(sf_session_settle(session_, 20'000, &error_), SF_OK) << error_.message;
    captured.join();
    durable.join();
    helper.join();
    EXPECT_EQ(ticket_info().state, SF_DURABLE);
  }
}

TEST_F(Save, closing_finishes_an_open_capture) {
  start_daemon();
  ByteTensors tensors({3 * kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  const auto saved = tensors.all();
  ASSERT_EQ(begin({.step = 5, .capture = SF_CAPTURE_LAZY}, tensors.sources(true)), SF_OK);
  ASSERT_EQ(sf_session_close(session_, 5000, &error_), SF_OK) << error_.message;
  session_ = nullptr;
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(sf_session_settle(session_, 20'000, &error_), SF_OK) << error_.message;
  for (auto& byte : tensors.bytes(0)) byte = 0;
  ASSERT_EQ(restore(tensors), SF_OK) << error_.message;
  EXPECT_EQ(tensors.all(), saved);
}

TEST_F(Save, a_forked_child_may_not_use_the_session_and_the_parent_goes_on) {
  start_daemon();
  ByteTensors tensors({kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(begin({}, tensors.sources(false)), SF_OK);
  const pid_t child = ::fork();
  if (child == 0) {
    sf_ticket info{};
    info.struct_bytes = sizeof info;
    const bool is_right = sf_ticket_get(session_, ticket_, &info, nullptr) == SF_INVALID_ARGUMENT &&
                          sf_session_settle(session_, 10, nullptr) == SF_INVALID_ARGUMENT &&
                          sf_session_close(session_, 10, nullptr) == SF_OK;
    ::_exit(is_right ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(wait_durable(), SF_OK) << error_.message;
  ASSERT_EQ(begin({}, tensors.sources(false)), SF_OK) << error_.message;
  EXPECT_EQ(wait_durable(), SF_OK) << error_.message;
}

TEST_F(Save, the_session_describes_itself_and_its_daemon) {
  start_daemon();
  ByteTensors tensors({kMiB});
  attach(tensors);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_EQ(begin({}, tensors.sources(false)), SF_OK);
  ASSERT_EQ(wait_durable(), SF_OK) << error_.message;
  char* json = nullptr;
  ASSERT_EQ(sf_session_describe(session_, &json, &error_), SF_OK);
  const std::string text = json;
  sf_free(json);
  for (const char* piece : {"\"lane\": \"host\"", "\"copy_kernel\": \"", "\"slot_count\": 2",
                            "\"connected\": true", "\"durable\": 1", "\"failed\": 0"}) {
    EXPECT_NE(text.find(piece), std::string::npos) << piece << " in " << text;
  }
  ASSERT_EQ(sf_daemon_status(socket_path().c_str(), &json, &error_), SF_OK) << error_.message;
  EXPECT_EQ(json[0], '{');
  sf_free(json);
  EXPECT_NE(sf_session_warnings(session_), nullptr);
}

}  // namespace
}  // namespace stillframe::testing
