#include "shm/channel.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <fstream>

#include "tests/shm/example_messages.h"
#include "tests/shm/open_fds.h"
#include "tests/shm/temporary_directory.h"

namespace stillframe::shm {
namespace {

// Two ends of one connection, and what a peer that does not keep to the protocol can do.
class Channels : public testing::Test {
 protected:
  void SetUp() override {
    int fds[2] = {-1, -1};
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds), 0);
    ours_ = Channel(UniqueFd(fds[0]));
    theirs_ = Channel(UniqueFd(fds[1]));
  }

  // Sends bytes as they are with copies of `fds`.
  void SendRaw(const std::string& bytes, const std::vector<int>& fds) {
    iovec piece = {const_cast<char*>(bytes.data()), bytes.size()};
    msghdr header = {};
    header.msg_iov = &piece;
    header.msg_iovlen = 1;
    std::vector<char> control(CMSG_SPACE(fds.size() * sizeof(int)));
    if (!fds.empty()) {
      header.msg_control = control.data();
      header.msg_controllen = control.size();
      cmsghdr* const part = CMSG_FIRSTHDR(&header);
      part->cmsg_level = SOL_SOCKET;
      part->cmsg_type = SCM_RIGHTS;
      part->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
      std::memcpy(CMSG_DATA(part), fds.data(), fds.size() * sizeof(int));
    }
    ASSERT_EQ(::sendmsg(theirs_.fd(), &header, MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
  }

  Code RefusalOfReceive() {
    const auto packet = ours_.receive();
    EXPECT_FALSE(packet);
    return packet ? Code::kInternal : packet.error().code();
  }

  Channel ours_;
  Channel theirs_;
};

UniqueFd AnyFd() { return UniqueFd(::open("/dev/null", O_RDONLY | O_CLOEXEC)); }

wire::MessageT Hello() { return example_message(wire::Body::Hello); }

ino_t InodeOf(int fd) {
  struct stat status = {};
  EXPECT_EQ(::fstat(fd, &status), 0);
  return status.st_ino;
}

TEST_F(Channels, say_so_when_there_is_nothing) {
  const auto packet = ours_.receive();
  ASSERT_TRUE(packet) << packet.error().message();
  EXPECT_FALSE(*packet);
}

TEST_F(Channels, carry_whole_messages_in_their_order) {
  for (const wire::Body kind : message_kinds()) {
    const auto sent = theirs_.send(example_message(kind));
    ASSERT_TRUE(sent) << sent.error().message();
    ASSERT_TRUE(*sent);
  }
  for (const wire::Body kind : message_kinds()) {
    const auto packet = ours_.receive();
    ASSERT_TRUE(packet && *packet);
    EXPECT_EQ((*packet)->message.body.type, kind);
    EXPECT_TRUE((*packet)->fds.empty());
  }
}

TEST_F(Channels, carry_up_to_four_descriptors_that_exec_closes) {
  for (std::size_t count = 0; count <= kFdsPerMessageMax; ++count) {
    std::vector<UniqueFd> files;
    std::vector<int> fds;
    for (std::size_t i = 0; i < count; ++i) {
      files.push_back(*make_sealed_memfd("test", std::string(i + 1, 'x')));
      fds.push_back(files.back().get());
    }
    ASSERT_TRUE(theirs_.send(Hello(), fds).operator*());
    const auto packet = ours_.receive();
    ASSERT_TRUE(packet && *packet);
    ASSERT_EQ((*packet)->fds.size(), count);
    for (std::size_t i = 0; i < count; ++i) {
      const int fd = (*packet)->fds[i].get();
      EXPECT_NE(fd, fds[i]);
      EXPECT_EQ(InodeOf(fd), InodeOf(fds[i]));
      EXPECT_EQ(::fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    }
  }
}

TEST_F(Channels, do_not_send_five_descriptors) {
  const UniqueFd file = AnyFd();
  const std::vector<int> fds(kFdsPerMessageMax + 1, file.get());
  const auto sent = theirs_.send(Hello(), fds);
  ASSERT_FALSE(sent);
  EXPECT_EQ(sent.error().code(), Code::kInvalidArgument);
  EXPECT_FALSE(*ours_.receive()) << "nothing went out";
}

TEST_F(Channels, refuse_a_packet_with_more_than_four_descriptors_and_keep_none) {
  const UniqueFd file = AnyFd();
  const std::string hello = *encode(Hello());
  for (const std::size_t count : {5U, 6U, 16U, 253U}) {
    const std::size_t before = open_fd_count();
    SendRaw(hello, std::vector<int>(count, file.get()));
    EXPECT_EQ(RefusalOfReceive(), Code::kInvalidArgument) << count;
    EXPECT_EQ(open_fd_count(), before) << count;
  }
}

TEST_F(Channels, refuse_a_packet_whose_descriptors_we_have_no_room_for_and_keep_none) {
  const UniqueFd file = AnyFd();
  SendRaw(*encode(Hello()), std::vector<int>(4, file.get()));
  const std::size_t before = open_fd_count();

  rlimit old = {};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &old), 0);
  // The next free number is the first that is over the limit but two.
  const UniqueFd next = AnyFd();
  rlimit narrow = old;
  narrow.rlim_cur = static_cast<rlim_t>(next.get()) + 3;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &narrow), 0);
  const Code code = RefusalOfReceive();
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &old), 0);

  EXPECT_EQ(code, Code::kInvalidArgument);
  EXPECT_EQ(open_fd_count(), before + 1) << "`next` alone";
}

TEST_F(Channels, refuse_what_is_no_message_and_keep_none_of_its_descriptors) {
  const UniqueFd file = AnyFd();
  const std::size_t before = open_fd_count();
  SendRaw("not a flatbuffer", {file.get(), file.get()});
  EXPECT_EQ(RefusalOfReceive(), Code::kInvalidArgument);
  EXPECT_EQ(open_fd_count(), before);
}

TEST_F(Channels, refuse_a_packet_of_more_than_64_KiB) {
  const UniqueFd file = AnyFd();
  const std::size_t before = open_fd_count();
  // Whose first 64 KiB would pass for a message.
  std::string packet = *encode(Hello());
  packet.resize(kMessageBytesMax + 1);
  SendRaw(packet, {file.get()});
  EXPECT_EQ(RefusalOfReceive(), Code::kInvalidArgument);
  EXPECT_EQ(open_fd_count(), before);
}

TEST_F(Channels, carry_a_message_of_nearly_64_KiB) {
  wire::StatusReplyT body;
  body.json.assign(kMessageBytesMax - 128, 'x');
  ASSERT_TRUE(theirs_.send(make_message(1, std::move(body))).operator*());
  const auto packet = ours_.receive();
  ASSERT_TRUE(packet && *packet);
  EXPECT_EQ((*packet)->message.body.AsStatusReply()->json.size(), kMessageBytesMax - 128);
}

TEST_F(Channels, take_an_empty_packet_for_the_end_and_keep_none_of_its_descriptors) {
  const UniqueFd file = AnyFd();
  const std::size_t before = open_fd_count();
  SendRaw("", {file.get()});
  EXPECT_EQ(RefusalOfReceive(), Code::kUnavailable);
  EXPECT_EQ(open_fd_count(), before);
}

TEST_F(Channels, deliver_what_was_sent_before_the_peer_went) {
  ASSERT_TRUE(theirs_.send(Hello()).operator*());
  theirs_ = Channel();
  const auto packet = ours_.receive();
  ASSERT_TRUE(packet && *packet);
  EXPECT_EQ(RefusalOfReceive(), Code::kUnavailable);
}

TEST_F(Channels, answer_to_a_peer_that_is_gone_with_an_error_not_a_signal) {
  theirs_ = Channel();
  const auto sent = ours_.send(Hello());
  ASSERT_FALSE(sent);
  EXPECT_EQ(sent.error().code(), Code::kUnavailable);
  EXPECT_EQ(RefusalOfReceive(), Code::kUnavailable);
}

TEST_F(Channels, are_full_when_the_peer_does_not_read_and_go_on_when_it_does) {
  std::size_t count = 0;
  while (true) {
    const auto sent = ours_.send(Hello());
    ASSERT_TRUE(sent) << sent.error().message();
    if (!*sent) break;
    ASSERT_LT(++count, 1'000'000U);
  }
  EXPECT_GT(count, 4U);
  for (std::size_t i = 0; i < count; ++i) ASSERT_TRUE(theirs_.receive().operator*());
  EXPECT_FALSE(*theirs_.receive());
  EXPECT_TRUE(ours_.send(Hello()).operator*());
}

TEST_F(Channels, wait_until_something_comes_or_the_peer_goes) {
  EXPECT_FALSE(*ours_.wait_readable(0));
  EXPECT_FALSE(*ours_.wait_readable(5));
  ASSERT_TRUE(theirs_.send(Hello()).operator*());
  EXPECT_TRUE(*ours_.wait_readable(10'000));
  ASSERT_TRUE(*ours_.receive());
  theirs_ = Channel();
  EXPECT_TRUE(*ours_.wait_readable(-1));
}

TEST_F(Channels, that_own_no_socket_answer_with_errors) {
  Channel none;
  EXPECT_FALSE(none);
  EXPECT_FALSE(none.receive());
  EXPECT_FALSE(none.send(Hello()));
  EXPECT_FALSE(none.peer());
}

class Listening : public testing::Test {
 protected:
  static mode_t ModeOf(const std::string& path) {
    struct stat status = {};
    EXPECT_EQ(::lstat(path.c_str(), &status), 0) << path;
    EXPECT_TRUE(S_ISSOCK(status.st_mode));
    return status.st_mode & 0777U;
  }
  static Code RefusalOfConnect(const std::string& path) {
    const auto channel = Channel::connect(path);
    EXPECT_FALSE(channel);
    return channel ? Code::kInternal : channel.error().code();
  }

  const TemporaryDirectory directory_;
  const std::string path_ = directory_ / "test.sock";
};

TEST_F(Listening, connects_processes_that_know_who_the_other_is) {
  const auto listener = listen_at(path_, 0600);
  ASSERT_TRUE(listener) << listener.error().message();
  const pid_t child = ::fork();
  if (child == 0) {
    auto channel = Channel::connect(path_);
    const bool is_sent = channel && channel->send(Hello()).has_value();
    // Stays until the parent has looked.
    if (is_sent) (void)channel->wait_readable(10'000);
    ::_exit(is_sent ? 0 : 1);
  }
  Channel channel;
  while (!channel) {
    channel = Channel(UniqueFd(::accept4(listener->get(), nullptr, nullptr, SOCK_CLOEXEC)));
  }
  ASSERT_TRUE(*channel.wait_readable(10'000));
  ASSERT_TRUE(*channel.receive());
  const auto peer = channel.peer();
  ASSERT_TRUE(peer);
  EXPECT_EQ(peer->pid, child);
  EXPECT_EQ(peer->uid, ::geteuid());
  EXPECT_EQ(peer->gid, ::getegid());
  channel = Channel();
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST_F(Listening, gives_the_socket_its_mode_whatever_the_umask_is) {
  const mode_t old = ::umask(0);
  for (const mode_t umask : {0000U, 0022U, 0077U, 0177U}) {
    (void)::umask(umask);
    for (const mode_t mode : {0600U, 0660U}) {
      const auto listener = listen_at(path_, mode);
      EXPECT_TRUE(listener);
      EXPECT_EQ(ModeOf(path_), mode) << "umask " << umask;
    }
  }
  (void)::umask(old);
}

TEST_F(Listening, takes_the_place_of_a_socket_that_nobody_holds) {
  ASSERT_TRUE(listen_at(path_, 0600));
  EXPECT_EQ(RefusalOfConnect(path_), Code::kUnavailable);
  const auto listener = listen_at(path_, 0600);
  ASSERT_TRUE(listener);
  EXPECT_TRUE(Channel::connect(path_));
}

TEST_F(Listening, does_not_remove_what_is_no_socket) {
  std::ofstream(path_) << "precious";
  const auto listener = listen_at(path_, 0600);
  ASSERT_FALSE(listener);
  EXPECT_EQ(listener.error().code(), Code::kInvalidArgument);
  EXPECT_EQ(std::filesystem::file_size(path_), 8U);
}

TEST_F(Listening, needs_a_path_that_fits) {
  const std::string longest = directory_ / std::string(107 - directory_.path().size() - 1, 'x');
  const auto listener = listen_at(longest, 0600);
  ASSERT_TRUE(listener) << listener.error().message();
  EXPECT_TRUE(Channel::connect(longest));

  EXPECT_EQ(RefusalOfConnect(longest + "x"), Code::kInvalidArgument);
  EXPECT_FALSE(listen_at(longest + "x", 0600));
  EXPECT_EQ(RefusalOfConnect(""), Code::kInvalidArgument);
  // The abstract namespace has no permissions (SHM-11).
  EXPECT_EQ(RefusalOfConnect(std::string("\0name", 5)), Code::kInvalidArgument);
}

TEST_F(Listening, somewhere_else_is_not_found) {
  EXPECT_EQ(RefusalOfConnect(directory_ / "nobody.sock"), Code::kNotFound);
}

TEST_F(Listening, without_taking_connections_is_unavailable_not_a_wait) {
  const UniqueFd listener(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path_.data(), path_.size());
  ASSERT_EQ(::bind(listener.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(::listen(listener.get(), 0), 0);
  std::vector<Channel> waiting;
  for (int i = 0; i < 8; ++i) {
    auto channel = Channel::connect(path_);
    if (!channel) {
      EXPECT_EQ(channel.error().code(), Code::kUnavailable);
      return;
    }
    waiting.push_back(std::move(*channel));
  }
  FAIL() << "a backlog of 0 took 8 connections";
}

}  // namespace
}  // namespace stillframe::shm
