// A peer at the socket that is no proper daemon: it answers garbage, nothing, or dies.
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

#include "client/connection.h"
#include "client/libstillframe.h"
#include "shm/channel.h"
#include "tests/support/trainer.h"

namespace stillframe::client {
namespace {

namespace wire = shm::wire;

// The other end of a connection, in a thread of its own.
class Peer {
 public:
  explicit Peer(std::function<void(shm::Channel& channel)> script) {
    int ends[2] = {-1, -1};
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    auto made = Connection::open(shm::Channel(UniqueFd(ends[0])), {});
    EXPECT_TRUE(made);
    connection_ = *std::move(made);
    thread_ = std::thread([end = ends[1], script = std::move(script)] {
      shm::Channel channel{UniqueFd(end)};
      script(channel);
    });
  }
  ~Peer() {
    connection_->drop(Error(Code::kCancelled, "the test ends"));
    thread_.join();
  }
  Connection& connection() { return *connection_; }

 private:
  std::shared_ptr<Connection> connection_;
  std::thread thread_;
};

// The next message; nullopt when the client has gone.
std::optional<wire::MessageT> next(shm::Channel& channel) {
  while (channel.wait_readable(-1)) {
    auto packet = channel.receive();
    if (!packet) return std::nullopt;
    if (*packet) return std::move((*packet)->message);
  }
  return std::nullopt;
}

void wait_until_gone(shm::Channel& channel) {
  while (next(channel)) {
  }
}

Result<shm::Packet> ask(Connection& connection, std::uint64_t timeout_ms) {
  return connection.call(shm::make_message(0, wire::StatusT()), {}, Deadline::after_ms(timeout_ms));
}

TEST(Protocol, a_peer_that_never_answers_costs_the_deadline_and_the_connection) {
  Peer peer(wait_until_gone);
  const auto begin = std::chrono::steady_clock::now();
  auto answer = ask(peer.connection(), 100);
  ASSERT_FALSE(answer);
  EXPECT_EQ(answer.error().code(), Code::kUnavailable);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(100));
  EXPECT_FALSE(peer.connection().is_open());
  EXPECT_FALSE(ask(peer.connection(), 10'000)) << "and then at once";
}

TEST(Protocol, a_reply_that_comes_late_is_dropped_where_the_caller_said_so) {
  Peer peer([](shm::Channel& channel) {
    const auto first = next(channel);
    const auto second = next(channel);
    if (!first || !second) return;
    for (const std::uint64_t request : {first->request, second->request}) {
      wire::StatusReplyT reply;
      reply.json = std::to_string(request);
      EXPECT_TRUE(channel.send(shm::make_message(request, std::move(reply))));
    }
    wait_until_gone(channel);
  });
  auto late = peer.connection().call(shm::make_message(0, wire::StatusT()), {},
                                     Deadline::after_ms(20), Connection::WhenLate::kKeep);
  EXPECT_FALSE(late);
  EXPECT_TRUE(peer.connection().is_open());
  auto answer = ask(peer.connection(), 10'000);
  ASSERT_TRUE(answer) << answer.error().message();
  EXPECT_EQ(answer->message.body.AsStatusReply()->json, "2");
}

TEST(Protocol, a_peer_that_answers_garbage_is_dropped) {
  Peer peer([](shm::Channel& channel) {
    (void)next(channel);
    EXPECT_EQ(::send(channel.fd(), "not a message", 13, MSG_NOSIGNAL), 13);
    wait_until_gone(channel);
  });
  auto answer = ask(peer.connection(), 10'000);
  ASSERT_FALSE(answer);
  EXPECT_EQ(answer.error().code(), Code::kUnavailable);
  EXPECT_NE(answer.error().message().find("protocol"), std::string_view::npos);
}

TEST(Protocol, a_peer_that_dies_answers_all_who_wait_at_once) {
  Peer peer([](shm::Channel& channel) {
    for (int i = 0; i < 3; ++i) (void)next(channel);
  });
  int gone_count = 0;
  peer.connection().set_handlers(
      {.on_message = {}, .on_gone = [&](const Error&) { ++gone_count; }});
  const auto begin = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] { EXPECT_FALSE(ask(peer.connection(), 60'000)); });
  }
  threads.emplace_back([&] {
    EXPECT_FALSE(peer.connection().wait([] { return false; }, Deadline::after_ms(60'000)));
  });
  for (std::thread& thread : threads) thread.join();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
  EXPECT_EQ(gone_count, 1);
}

TEST(Protocol, many_threads_share_one_socket_and_each_gets_its_own_reply) {
  Peer peer([](shm::Channel& channel) {
    // Answers in pairs and in reverse, with something unasked in between.
    std::optional<wire::MessageT> held;
    while (auto message = next(channel)) {
      if (!held) {
        held = std::move(message);
        continue;
      }
      for (const std::uint64_t request : {message->request, std::uint64_t{0}, held->request}) {
        wire::StatusReplyT reply;
        reply.json = std::to_string(request);
        EXPECT_TRUE(channel.send(shm::make_message(request, std::move(reply))));
      }
      held.reset();
    }
  });
  std::atomic<int> unasked_count = 0;
  std::atomic<int> answer_count = 0;
  peer.connection().set_handlers(
      {.on_message = [&](wire::MessageT) { ++unasked_count; }, .on_gone = {}});
  constexpr int kCalls = 200;
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] {
      for (int call = 0; call < kCalls; ++call) {
        auto answer = ask(peer.connection(), 60'000);
        ASSERT_TRUE(answer) << answer.error().message();
        EXPECT_EQ(answer->message.body.AsStatusReply()->json,
                  std::to_string(answer->message.request));
        ++answer_count;
        peer.connection().wake();
      }
    });
  }
  auto waited = peer.connection().wait([&] { return answer_count == 2 * kCalls; },
                                       Deadline::after_ms(60'000));
  EXPECT_TRUE(waited && *waited);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(unasked_count, kCalls);
}

// --- From sf_attach() on
// ---------------------------------------------------------------------------

// Listens at a path and plays a daemon's part for one client.
class FalseDaemon {
 public:
  FalseDaemon(const std::string& path, std::function<void(shm::Channel& channel)> script) {
    auto listener = shm::listen_at(path, 0600);
    EXPECT_TRUE(listener);
    thread_ = std::thread([listener = *std::move(listener), script = std::move(script)] {
      pollfd waiting{.fd = listener.get(), .events = POLLIN, .revents = 0};
      (void)::poll(&waiting, 1, 10'000);
      shm::Channel channel{UniqueFd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC))};
      script(channel);
    });
  }
  ~FalseDaemon() { thread_.join(); }

 private:
  std::thread thread_;
};

wire::MessageT hello_reply(std::uint64_t request, std::uint32_t version) {
  wire::HelloReplyT reply;
  reply.protocol_version = version;
  reply.version = "0.0.0";
  return shm::make_message(request, std::move(reply));
}

int attach_to(const std::string& socket_path, sf_error& error) {
  sf_attach_options options{};
  options.struct_bytes = sizeof options;
  options.no_autostart = 1;
  options.timeout_ms = 1'000;
  options.run_path = "/nonexistent/run";
  options.socket_path = socket_path.c_str();
  sf_session* session = nullptr;
  const int code = sf_attach(&options, &session, &error);
  EXPECT_EQ(session, nullptr);
  return code;
}

TEST(Attach, refuses_a_daemon_of_another_protocol_version) {
  const testing::ScratchDirectory scratch;
  FalseDaemon daemon(scratch.path("socket"), [](shm::Channel& channel) {
    const auto hello = next(channel);
    if (!hello) return;
    EXPECT_TRUE(channel.send(hello_reply(hello->request, 7)));
    wait_until_gone(channel);
  });
  sf_error error{};
  EXPECT_EQ(attach_to(scratch.path("socket"), error), SF_INVALID_ARGUMENT);
  EXPECT_NE(std::string(error.message).find("protocol version"), std::string::npos);
}

TEST(Attach, survives_an_answer_of_the_wrong_kind_and_a_peer_that_leaves) {
  for (const bool answers : {true, false}) {
    const testing::ScratchDirectory scratch;
    FalseDaemon daemon(scratch.path("socket"), [answers](shm::Channel& channel) {
      const auto hello = next(channel);
      if (!hello) return;
      EXPECT_TRUE(channel.send(hello_reply(hello->request, shm::kProtocolVersion)));
      const auto attach = next(channel);
      if (!attach || !answers) return;
      EXPECT_TRUE(channel.send(shm::make_message(attach->request, wire::DoneT())));
      wait_until_gone(channel);
    });
    sf_error error{};
    EXPECT_EQ(attach_to(scratch.path("socket"), error), SF_UNAVAILABLE) << answers;
  }
}

}  // namespace
}  // namespace stillframe::client
