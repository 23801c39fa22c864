// The trainer's process runs out of memory at any moment of any call: the call says so, the process
// lives, and once there is memory again the session goes on.
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "client/libstillframe.h"
#include "tests/client/test_session.h"
#include "tests/support/failing_new.h"

namespace stillframe::testing {
namespace {

// A sanitizer makes each turn ten times as long; there every fifth allocation has to do.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::int64_t kStride = 5;
#else
constexpr std::int64_t kStride = 1;
#endif

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

// What a call may answer that was not given the memory it wanted; it may also do without.
bool is_honest(int code) {
  return code == SF_OK || code == SF_RESOURCE_EXHAUSTED || code == SF_UNAVAILABLE;
}

class NoMemory : public SessionTest, public ::testing::WithParamInterface<FailingNew::How> {
 protected:
  // Runs `call` again and again, each time with the next allocation failing, until it asked for
  // none that failed. `prepare` and `after` have memory.
  void at_every_allocation(const char* what, const std::function<void()>& prepare,
                           const std::function<int()>& call,
                           const std::function<void(int)>& after) {
    std::int64_t failed_count = 0;
    for (std::int64_t nth = 0;; nth += kStride) {
      SCOPED_TRACE(std::string(what) + ", allocation " + std::to_string(nth));
      prepare();
      if (HasFatalFailure()) return;
      int code = SF_OK;
      {
        const FailingNew failing(nth, GetParam());
        code = call();
      }
      const bool was_hit = has_new_failed();
      EXPECT_TRUE(is_honest(code)) << code << ": " << error_.message;
      if (!was_hit) {
        EXPECT_EQ(code, SF_OK) << error_.message;
      }
      after(code);
      if (HasFailure()) return;
      if (!was_hit) break;
      ++failed_count;
    }
    EXPECT_GT(failed_count, 0);
    std::cout << what << ": " << failed_count << " allocations failed in turn\n";
  }

  void save_durable() {
    ++step_;
    const auto sources = tensors_.sources(false);
    ASSERT_EQ(begin({.step = step_}, sources), SF_OK) << error_.message;
    ASSERT_EQ(wait_durable(), SF_OK) << error_.message;
  }
  void restores_newest() {
    ByteTensors read({kMiB, 100});
    ASSERT_EQ(restore(read), SF_OK) << error_.message;
    EXPECT_EQ(read.all(), tensors_.all());
  }

  // Keeps two checkpoints: a run that grows would want more memory with every turn.
  void attach_keeping_two(const ByteTensors& tensors) {
    sf_attach_options options = attach_options();
    options.keep_last = 2;
    ASSERT_EQ(sf_attach(&options, &session_, &error_), SF_OK) << error_.message;
    const sf_part part = tensors.part();
    ASSERT_EQ(sf_layout_register(session_, &part, 1, 10'000, &error_), SF_OK) << error_.message;
  }

  std::uint64_t remove_temporaries() {
    std::uint64_t count = 0;
    for (const auto& entry : std::filesystem::directory_iterator(scratch_.path(""))) {
      if (!entry.path().filename().string().starts_with(".stillframe-tmp-")) continue;
      std::filesystem::remove_all(entry.path());
      ++count;
    }
    return count;
  }

  // As begin() and restore(), without an allocation of the test's own.
  int begin_plainly(sf_capture capture, const std::vector<sf_source>& sources) {
    sf_save_options options{};
    options.struct_bytes = sizeof options;
    options.capture = capture;
    options.busy_timeout_ms = 10'000;
    options.step = ++step_;
    options.state_json = "{\"format_version\": 1}";
    options.state_bytes = std::strlen(options.state_json);
    return sf_save_begin(session_, &options, sources.data(), sources.size(), &ticket_, &error_);
  }
  int restore_plainly(const char* path, const std::vector<sf_target>& targets,
                      sf_session* session) {
    sf_checkpoint* checkpoint = nullptr;
    const int opened = sf_checkpoint_open(path, "latest", session, &checkpoint, &error_);
    if (opened != SF_OK) return opened;
    const int read =
        sf_checkpoint_read(checkpoint, targets.data(), targets.size(), nullptr, &error_);
    sf_checkpoint_close(checkpoint);
    return read;
  }

  ByteTensors tensors_{{kMiB, 100}};
  std::int64_t step_ = 0;
};

TEST_P(NoMemory, attaching_fails_and_can_be_repeated) {
  start_daemon();
  const sf_attach_options options = attach_options();
  at_every_allocation(
      "attach", [] {}, [this, &options] { return sf_attach(&options, &session_, &error_); },
      [this](int code) {
        EXPECT_EQ(session_ != nullptr, code == SF_OK);
        close();
      });
}

TEST_P(NoMemory, registering_a_layout_fails_and_can_be_repeated) {
  start_daemon();
  attach();
  at_every_allocation(
      "layout", [] {},
      [this] {
        const sf_part part = tensors_.part();
        return sf_layout_register(session_, &part, 1, 10'000, &error_);
      },
      [this](int) {
        const sf_part part = tensors_.part();
        ASSERT_EQ(sf_layout_register(session_, &part, 1, 10'000, &error_), SF_OK) << error_.message;
        save_durable();
        // Another one, so that the next registration has something to do.
        const sf_part other = tensors_.part("other");
        ASSERT_EQ(sf_layout_register(session_, &other, 1, 10'000, &error_), SF_OK);
      });
}

TEST_P(NoMemory, an_eager_save_fails_and_the_next_one_is_durable) {
  start_daemon();
  attach_keeping_two(tensors_);
  ASSERT_FALSE(HasFatalFailure());
  const auto sources = tensors_.sources(false);
  at_every_allocation(
      "eager save", [this] { save_durable(); },
      [this, &sources] { return begin_plainly(SF_CAPTURE_EAGER, sources); },
      [this](int code) {
        if (code == SF_OK) {
          const int waited = wait_durable();
          EXPECT_TRUE(waited == SF_OK || waited == SF_UNAVAILABLE) << waited;
        }
        save_durable();
        restores_newest();
      });
}

TEST_P(NoMemory, a_lazy_save_fails_and_lets_go_of_the_tensors) {
  start_daemon();
  attach_keeping_two(tensors_);
  ASSERT_FALSE(HasFatalFailure());
  const auto sources = tensors_.sources(true);
  bool has_begun = false;
  at_every_allocation(
      "lazy save", [this] { save_durable(); },
      [this, &sources, &has_begun] {
        has_begun = false;
        int code = begin_plainly(SF_CAPTURE_LAZY, sources);
        if (code != SF_OK) return code;
        has_begun = true;
        code = sf_capture_wait(session_, ticket_, 5000, 1, &error_);
        if (code != SF_OK) return code;
        return sf_capture_publish(session_, ticket_, &error_);
      },
      [this, &has_begun](int code) {
        if (has_begun && code != SF_OK) {
          EXPECT_EQ(sf_capture_void(session_, ticket_, 0, "no memory", &error_), SF_OK);
          EXPECT_EQ(ticket_info().state, SF_FAILED);
        }
        save_durable();
        restores_newest();
      });
}

TEST_P(NoMemory, waiting_for_durable_fails_and_hides_no_end) {
  start_daemon();
  attach_keeping_two(tensors_);
  ASSERT_FALSE(HasFatalFailure());
  const auto sources = tensors_.sources(false);
  at_every_allocation(
      "wait", [this, &sources] { ASSERT_EQ(begin({.step = ++step_}, sources), SF_OK); },
      [this] { return sf_ticket_wait(session_, ticket_, SF_DURABLE, 20'000, &error_); },
      [this](int) {
        const int waited = sf_ticket_wait(session_, ticket_, SF_DURABLE, 5'000, &error_);
        EXPECT_TRUE(is_honest(waited)) << waited;
        save_durable();
      });
}

TEST_P(NoMemory, restoring_from_the_drive_fails_and_can_be_repeated) {
  start_daemon();
  attach_keeping_two(tensors_);
  ASSERT_FALSE(HasFatalFailure());
  save_durable();
  ByteTensors read({kMiB, 100});
  const auto targets = read.targets();
  const std::string path = run_path();
  at_every_allocation(
      "restore", [] {},
      [this, &path, &targets] { return restore_plainly(path.c_str(), targets, nullptr); },
      [this](int) { restores_newest(); });
}

TEST_P(NoMemory, restoring_from_memory_fails_and_can_be_repeated) {
  start_daemon();
  attach_keeping_two(tensors_);
  ASSERT_FALSE(HasFatalFailure());
  ByteTensors read({kMiB, 100});
  const auto targets = read.targets();
  const std::string path = run_path();
  at_every_allocation(
      "restore from memory", [this] { save_durable(); },
      [this, &path, &targets] { return restore_plainly(path.c_str(), targets, session_); },
      [this](int) {
        save_durable();
        restores_newest();
      });
}

TEST_P(NoMemory, writing_a_model_fails_and_leaves_the_one_before) {
  const std::string path = run_path();
  const auto sources = tensors_.sources(false);
  const auto write = [this, &path, &sources] {
    sf_write_options options{};
    options.struct_bytes = sizeof options;
    options.path = path.c_str();
    const sf_part part = tensors_.part();
    return sf_model_write(&options, &part, 1, sources.data(), sources.size(), &error_);
  };
  ASSERT_EQ(write(), SF_OK) << error_.message;
  std::uint64_t leftover_count = 0;
  at_every_allocation(
      "write model", [] {}, write,
      [&](int) {
        restores_newest();
        leftover_count += remove_temporaries();
      });
  std::cout << leftover_count << " temporary directories left\n";
  // To remove files takes memory too; what that leaves is the next write's to sweep.
  if (GetParam() == FailingNew::How::kOnce) {
    EXPECT_LE(leftover_count, 20U);
  }
}

TEST_P(NoMemory, closing_ends_the_session_all_the_same) {
  start_daemon();
  at_every_allocation(
      "close",
      [this] {
        attach_keeping_two(tensors_);
        if (!HasFatalFailure()) save_durable();
      },
      [this] { return sf_session_close(std::exchange(session_, nullptr), 2000, &error_); },
      [](int) {});
}

INSTANTIATE_TEST_SUITE_P(Allocations, NoMemory,
                         ::testing::Values(FailingNew::How::kOnce, FailingNew::How::kForEver),
                         [](const auto& each) {
                           return each.param == FailingNew::How::kOnce ? "once" : "for_ever";
                         });

}  // namespace
}  // namespace stillframe::testing
