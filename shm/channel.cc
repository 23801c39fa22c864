#include "shm/channel.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include "base/os_error.h"
#include "base/text.h"

namespace stillframe::shm {

namespace {

// The kernel counts a packet with its bookkeeping; 4 of the largest may wait for the reader.
constexpr int kSocketBufferBytes = 4 * static_cast<int>(kMessageBytesMax);

// `path` as the kernel wants it: zero-terminated in 108 bytes.
Result<sockaddr_un> address_of(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path ||
      path.find('\0') != std::string::npos) {
    return Error(Code::kInvalidArgument, concat("socket path: ", path.size(), " bytes, 1 to ",
                                                sizeof address.sun_path - 1, " fit: ", path));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

Result<UniqueFd> make_socket() {
  UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) return os_error("socket", errno);
  return socket;
}

// Owns every descriptor of a received message, so that no return leaves one open.
std::vector<UniqueFd> take_fds(msghdr& header) {
  std::vector<UniqueFd> fds;
  for (cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
      fds.emplace_back(fd);
    }
  }
  return fds;
}

}  // namespace

Channel::Channel(UniqueFd socket) : socket_(std::move(socket)) {
  int bytes = 0;
  socklen_t length = sizeof bytes;
  if (::getsockopt(fd(), SOL_SOCKET, SO_SNDBUF, &bytes, &length) != 0) return;
  if (bytes >= kSocketBufferBytes) return;
  // Refused only where the administrator capped it; the largest packet still fits the default.
  (void)::setsockopt(fd(), SOL_SOCKET, SO_SNDBUF, &kSocketBufferBytes, sizeof kSocketBufferBytes);
}

Result<Channel> Channel::connect(const std::string& path) {
  const auto address = address_of(path);
  if (!address) return address.error();
  auto socket = make_socket();
  if (!socket) return std::move(socket).error();
  if (::connect(socket->get(), reinterpret_cast<const sockaddr*>(&*address), sizeof *address) !=
      0) {
    const int number = errno;
    // EAGAIN: somebody listens, but does not take connections. To wait for it inside connect()
    // would be to wait without a deadline.
    if (number == EAGAIN) {
      return Error(Code::kUnavailable, concat("connect ", path, ": too many wait already"), number);
    }
    return os_error(concat("connect ", path), number);
  }
  return Channel(std::move(*socket));
}

Result<std::optional<Packet>> Channel::receive() {
  const auto buffer = std::make_unique_for_overwrite<std::byte[]>(kMessageBytesMax);
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kFdsPerMessageMax)];
  iovec piece = {buffer.get(), kMessageBytesMax};
  msghdr header = {};
  header.msg_iov = &piece;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof control;

  ssize_t count = -1;
  do {
    count = ::recvmsg(fd(), &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  } while (count < 0 && errno == EINTR);
  if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return std::optional<Packet>();
  if (count < 0) return os_error("receive", errno);

  std::vector<UniqueFd> fds = take_fds(header);
  if ((header.msg_flags & MSG_CTRUNC) != 0) {
    return Error(Code::kInvalidArgument,
                 concat("receive: descriptors were cut off; at most ", kFdsPerMessageMax,
                        " are allowed, and we may have no more"));
  }
  if ((header.msg_flags & MSG_TRUNC) != 0) {
    return Error(Code::kInvalidArgument,
                 concat("receive: a packet of more than ", kMessageBytesMax, " bytes"));
  }
  // The end of the stream, and an empty packet, which no message is.
  if (count == 0) return Error(Code::kUnavailable, "receive: the peer is gone");
  auto message = decode_message({buffer.get(), static_cast<std::size_t>(count)});
  if (!message) return std::move(message).error();
  return std::optional(Packet{std::move(*message), std::move(fds)});
}

Result<bool> Channel::send(const wire::MessageT& message, std::span<const int> fds) {
  if (fds.size() > kFdsPerMessageMax) {
    return Error(Code::kInvalidArgument, concat("send: ", fds.size(), " descriptors, at most ",
                                                kFdsPerMessageMax, " are allowed"));
  }
  auto packet = encode(message);
  if (!packet) return std::move(packet).error();

  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kFdsPerMessageMax)] = {};
  iovec piece = {packet->data(), packet->size()};
  msghdr header = {};
  header.msg_iov = &piece;
  header.msg_iovlen = 1;
  if (!fds.empty()) {
    header.msg_control = control;
    header.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* const part = CMSG_FIRSTHDR(&header);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(part), fds.data(), fds.size_bytes());
  }

  ssize_t count = -1;
  do {
    // MSG_NOSIGNAL: a peer's death must not end the trainer.
    count = ::sendmsg(fd(), &header, MSG_DONTWAIT | MSG_NOSIGNAL);
  } while (count < 0 && errno == EINTR);
  if (count >= 0) return true;  // A packet goes as a whole or not at all.
  if (errno == EAGAIN || errno == EWOULDBLOCK) return false;
  // The user has more descriptors in flight, unread in sockets, than it may have open (SHM-9).
  if (errno == ETOOMANYREFS) {
    return Error(Code::kResourceExhausted, "send: too many descriptors in flight", errno);
  }
  return os_error(concat("send ", wire::EnumNameBody(message.body.type)), errno);
}

Result<bool> Channel::wait_readable(int timeout_ms) {
  const SystemClock clock;
  const std::int64_t deadline_ns = clock.monotonic_ns() + std::int64_t{timeout_ms} * 1'000'000;
  int rest_ms = timeout_ms;
  while (true) {
    pollfd wanted = {fd(), POLLIN, 0};
    const int count = ::poll(&wanted, 1, rest_ms);
    // A hang-up and an error count too: receive() says which.
    if (count > 0) return true;
    if (count == 0) return false;
    if (errno != EINTR) return os_error("poll", errno);
    if (timeout_ms < 0) continue;
    const std::int64_t rest_ns = deadline_ns - clock.monotonic_ns();
    rest_ms = static_cast<int>(std::max<std::int64_t>(0, (rest_ns + 999'999) / 1'000'000));
  }
}

Result<PeerCredentials> Channel::peer() const {
  ucred credentials = {};
  socklen_t length = sizeof credentials;
  if (::getsockopt(fd(), SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) {
    return os_error("SO_PEERCRED", errno);
  }
  return PeerCredentials{credentials.pid, credentials.uid, credentials.gid};
}

Result<UniqueFd> listen_at(const std::string& path, mode_t mode) {
  const auto address = address_of(path);
  if (!address) return address.error();
  struct stat old = {};
  if (::lstat(path.c_str(), &old) == 0) {
    if (!S_ISSOCK(old.st_mode)) {
      return Error(Code::kInvalidArgument, concat("listen ", path, ": there, and not a socket"));
    }
    if (::unlink(path.c_str()) != 0) return os_error(concat("unlink ", path), errno);
  }
  auto socket = make_socket();
  if (!socket) return socket;
  // bind() takes the file's mode from the socket and the umask only takes bits away, so nobody else
  // can connect between bind() and chmod(), which puts back what the umask took.
  if (::fchmod(socket->get(), mode) != 0) return os_error("fchmod socket", errno);
  if (::bind(socket->get(), reinterpret_cast<const sockaddr*>(&*address), sizeof *address) != 0) {
    return os_error(concat("bind ", path), errno);
  }
  if (::chmod(path.c_str(), mode) != 0) return os_error(concat("chmod ", path), errno);
  // 8 ranks of a node connect at once; the kernel caps it at net.core.somaxconn.
  if (::listen(socket->get(), 128) != 0) return os_error(concat("listen ", path), errno);
  return socket;
}

}  // namespace stillframe::shm
