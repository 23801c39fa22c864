#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "bench/raw/raw.h"

namespace raw {

double commit_seconds(const std::string& directory, const Memory& memory) {
  const std::string fresh = directory + "/raw_commit.new";
  const std::string final_name = directory + "/raw_commit";
  const std::size_t bytes = std::min(memory.bytes(), std::size_t{1} << 20);
  const int directory_fd = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory_fd < 0) die(directory.c_str());

  const double start = now_seconds();
  const int fd = ::open(fresh.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) die(fresh.c_str());
  if (::write(fd, memory.data(), bytes) != static_cast<ssize_t>(bytes)) die("write");
  if (::fsync(fd) != 0) die("fsync");
  if (::close(fd) != 0) die("close");
  if (::rename(fresh.c_str(), final_name.c_str()) != 0) die("rename");
  if (::fsync(directory_fd) != 0) die("fsync of the directory");
  const double seconds = now_seconds() - start;

  (void)::close(directory_fd);
  return seconds;
}

}  // namespace raw
