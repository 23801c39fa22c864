#pragma once

// A daemon and a session attached to it, for the tests of the client.

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "client/libstillframe.h"
#include "tests/support/trainer.h"

namespace stillframe::testing {

struct SaveSettings {
  std::int64_t step = 1;
  sf_capture capture = SF_CAPTURE_EAGER;
  sf_check check = SF_CHECK_SAMPLE;
  std::uint32_t busy_timeout_ms = 10'000;
  std::string state_json = "{\"format_version\": 1}";
};

// One tensor of U8 for each entry, all in the part "model".
class ByteTensors {
 public:
  explicit ByteTensors(const std::vector<std::uint64_t>& byte_counts) {
    for (std::size_t i = 0; i < byte_counts.size(); ++i) {
      names_.push_back("tensor." + std::to_string(i));
      shapes_.push_back(byte_counts[i]);
      bytes_.emplace_back(byte_counts[i], static_cast<std::uint8_t>(i + 1));
    }
    for (std::size_t i = 0; i < byte_counts.size(); ++i) {
      constexpr std::uint32_t kU8 = 1;
      tensors_.push_back(
          {.name = names_[i].c_str(), .shape = &shapes_[i], .dimension_count = 1, .dtype = kU8});
    }
  }
  sf_part part(const char* name = "model") const {
    return {.name = name,
            .tensors = tensors_.data(),
            .tensor_count = tensors_.size(),
            .metadata = nullptr,
            .metadata_count = 0};
  }
  std::vector<sf_source> sources(bool is_lazy) const {
    std::vector<sf_source> sources;
    for (const auto& bytes : bytes_) {
      sources.push_back({.data = bytes.data(),
                         .stride_bytes = nullptr,
                         .lazy = is_lazy ? 1U : 0U,
                         .memory = SF_MEMORY_HOST});
    }
    return sources;
  }
  std::vector<sf_target> targets() {
    std::vector<sf_target> targets;
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      targets.push_back({.part_index = 0,
                         .name = names_[i].c_str(),
                         .data = bytes_[i].data(),
                         .bytes = bytes_[i].size(),
                         .stride_bytes = nullptr,
                         .memory = SF_MEMORY_HOST,
                         .reserved = 0});
    }
    return targets;
  }
  std::vector<std::uint8_t>& bytes(std::size_t tensor) { return bytes_[tensor]; }
  const std::vector<std::vector<std::uint8_t>>& all() const { return bytes_; }

 private:
  std::vector<std::string> names_;
  std::vector<std::uint64_t> shapes_;
  std::vector<std::vector<std::uint8_t>> bytes_;
  std::vector<sf_tensor> tensors_;
};

class SessionTest : public ::testing::Test {
 protected:
  ~SessionTest() override { close(); }

  void start_daemon(const DaemonProcess::Variables& variables = {}) {
    daemon_ = std::make_unique<DaemonProcess>(socket_path(), variables);
    ASSERT_TRUE(daemon_->wait_listening());
  }
  std::string socket_path() const { return scratch_.path("socket"); }
  std::string run_path() const { return scratch_.path("run"); }

  sf_attach_options attach_options() {
    sf_attach_options options{};
    options.struct_bytes = sizeof options;
    options.world_size = 1;
    options.no_autostart = 1;
    run_path_ = run_path();
    socket_path_ = socket_path();
    options.run_path = run_path_.c_str();
    options.socket_path = socket_path_.c_str();
    return options;
  }
  void attach() {
    const sf_attach_options options = attach_options();
    ASSERT_EQ(sf_attach(&options, &session_, &error_), SF_OK) << error_.message;
  }
  void attach(const ByteTensors& tensors) {
    attach();
    if (HasFatalFailure()) return;
    const sf_part part = tensors.part();
    ASSERT_EQ(sf_layout_register(session_, &part, 1, 10'000, &error_), SF_OK) << error_.message;
  }
  void close() {
    if (session_ != nullptr) (void)sf_session_close(session_, 2000, nullptr);
    session_ = nullptr;
  }

  int begin(const SaveSettings& settings, const std::vector<sf_source>& sources) {
    sf_save_options options{};
    options.struct_bytes = sizeof options;
    options.capture = settings.capture;
    options.check = settings.check;
    options.busy_timeout_ms = settings.busy_timeout_ms;
    options.step = settings.step;
    options.state_json = settings.state_json.c_str();
    options.state_bytes = settings.state_json.size();
    return sf_save_begin(session_, &options, sources.data(), sources.size(), &ticket_, &error_);
  }
  int wait_durable() { return sf_ticket_wait(session_, ticket_, SF_DURABLE, 20'000, &error_); }
  sf_ticket ticket_info() {
    sf_ticket info{};
    info.struct_bytes = sizeof info;
    EXPECT_EQ(sf_ticket_get(session_, ticket_, &info, &error_), SF_OK) << error_.message;
    return info;
  }
  // The newest checkpoint's bytes into `tensors`.
  int restore(ByteTensors& tensors, sf_session* session = nullptr, sf_read_stats* stats = nullptr) {
    sf_checkpoint* checkpoint = nullptr;
    const int opened =
        sf_checkpoint_open(run_path().c_str(), "latest", session, &checkpoint, &error_);
    if (opened != SF_OK) return opened;
    const auto targets = tensors.targets();
    const int read = sf_checkpoint_read(checkpoint, targets.data(), targets.size(), stats, &error_);
    sf_checkpoint_close(checkpoint);
    return read;
  }

  ScratchDirectory scratch_;
  std::unique_ptr<DaemonProcess> daemon_;
  sf_session* session_ = nullptr;
  sf_error error_{};
  std::uint64_t ticket_ = 0;

 private:
  std::string run_path_;
  std::string socket_path_;
};

}  // namespace stillframe::testing
