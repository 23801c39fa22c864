#include <fcntl.h>
#include <liburing.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>

#include "bench/raw/raw.h"

namespace raw {

namespace {

constexpr std::size_t kChunkBytes = std::size_t{4} << 20;
constexpr unsigned kDepth = 4;

enum class Way { kWrite, kRead };

int open_direct(const std::string& path, int flags) {
  const int fd = ::open(path.c_str(), flags | O_DIRECT | O_CLOEXEC, 0600);
  if (fd < 0) die(path.c_str());
  return fd;
}

// Moves all of `memory` to or from the file, in order, kDepth chunks in flight.
void transfer(io_uring& ring, int fd, const Memory& memory, Way way) {
  std::size_t queued_bytes = 0;
  std::size_t done_bytes = 0;
  unsigned in_flight = 0;
  while (done_bytes < memory.bytes()) {
    for (; in_flight < kDepth && queued_bytes < memory.bytes(); ++in_flight) {
      const std::size_t chunk_bytes = std::min(kChunkBytes, memory.bytes() - queued_bytes);
      io_uring_sqe* const sqe = io_uring_get_sqe(&ring);
      const auto length = static_cast<unsigned>(chunk_bytes);
      if (way == Way::kWrite) {
        io_uring_prep_write(sqe, fd, memory.data() + queued_bytes, length, queued_bytes);
      } else {
        io_uring_prep_read(sqe, fd, memory.data() + queued_bytes, length, queued_bytes);
      }
      io_uring_sqe_set_data64(sqe, chunk_bytes);
      queued_bytes += chunk_bytes;
    }
    if (io_uring_submit_and_wait(&ring, 1) < 0) die("io_uring_submit_and_wait");
    io_uring_cqe* cqe = nullptr;
    while (io_uring_peek_cqe(&ring, &cqe) == 0) {
      const std::uint64_t wanted_bytes = io_uring_cqe_get_data64(cqe);
      if (cqe->res < 0 || static_cast<std::uint64_t>(cqe->res) != wanted_bytes) {
        errno = cqe->res < 0 ? -cqe->res : EIO;
        die("a transfer failed or was short");
      }
      done_bytes += wanted_bytes;
      --in_flight;
      io_uring_cqe_seen(&ring, cqe);
    }
  }
}

// Seconds of `work(ring)`; the ring is made before and unmade after.
template <class Work>
double timed_with_ring(Work work) {
  io_uring ring;
  if (io_uring_queue_init(kDepth, &ring, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN) !=
          0 &&
      io_uring_queue_init(kDepth, &ring, 0) != 0) {
    die("io_uring_queue_init");
  }
  const double start = now_seconds();
  work(ring);
  const double seconds = now_seconds() - start;
  io_uring_queue_exit(&ring);
  return seconds;
}

WriteSeconds write_fd(int fd, const Memory& memory, bool allocate) {
  WriteSeconds seconds;
  seconds.durable = timed_with_ring([&](io_uring& ring) {
    const double start = now_seconds();
    if (allocate && ::fallocate(fd, 0, 0, static_cast<off_t>(memory.bytes())) != 0)
      die("fallocate");
    transfer(ring, fd, memory, Way::kWrite);
    seconds.taken = now_seconds() - start;
    if (::fdatasync(fd) != 0) die("fdatasync");
  });
  return seconds;
}

bool has_bytes(int fd, std::size_t bytes) {
  struct stat status = {};
  if (::fstat(fd, &status) != 0) die("fstat");
  return static_cast<std::size_t>(status.st_size) == bytes &&
         static_cast<std::size_t>(status.st_blocks) * 512 >= bytes;
}

}  // namespace

WriteSeconds write_phases(const std::string& path, const Memory& memory, FileState state) {
  if (state == FileState::kFresh && ::unlink(path.c_str()) != 0 && errno != ENOENT) die("unlink");
  const int fd = open_direct(path, O_RDWR | O_CREAT);
  if (state == FileState::kReused && !has_bytes(fd, memory.bytes())) {
    if (::ftruncate(fd, 0) != 0) die("ftruncate");
    (void)write_fd(fd, memory, true);
  }
  const WriteSeconds seconds = write_fd(fd, memory, state == FileState::kFresh);
  if (::close(fd) != 0) die("close");
  return seconds;
}

double write_seconds(const std::string& path, const Memory& memory, FileState state) {
  return write_phases(path, memory, state).durable;
}

double read_seconds(const std::string& path, Memory& memory) {
  const int fd = open_direct(path, O_RDONLY);
  if (!has_bytes(fd, memory.bytes())) die("the file to read has another size");
  if (::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0) die("posix_fadvise");
  const double seconds =
      timed_with_ring([&](io_uring& ring) { transfer(ring, fd, memory, Way::kRead); });
  if (::close(fd) != 0) die("close");
  return seconds;
}

}  // namespace raw
