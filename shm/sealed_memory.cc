#include "shm/sealed_memory.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <string>

#include "base/os_error.h"
#include "base/text.h"
#include "shm/channel.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U  // Linux 6.3.
#endif
#ifndef F_SEAL_EXEC
#define F_SEAL_EXEC 0x0020  // Linux 6.3.
#endif

namespace stillframe::shm {

Result<UniqueFd> make_memfd(const char* name, unsigned extra_flags) {
  const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | extra_flags;
  // Where vm.memfd_noexec is 2, a memfd that could become executable is refused; before Linux 6.3
  // the flag that says it must not is.
  UniqueFd fd(::memfd_create(name, flags | MFD_NOEXEC_SEAL));
  if (!fd && errno == EINVAL) fd = UniqueFd(::memfd_create(name, flags));
  if (!fd) return os_error(concat("memfd_create ", name), errno);
  return fd;
}

Status set_length_and_seal(int fd, std::uint64_t bytes, int seals) {
  if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    return os_error(concat("memfd: set length ", bytes), errno);
  }
  if (::fcntl(fd, F_ADD_SEALS, seals) != 0) return os_error("memfd: F_ADD_SEALS", errno);
  return ok();
}

Result<int> seals_of(int fd) {
  const int seals = ::fcntl(fd, F_GET_SEALS);
  // EINVAL is what a regular file, a pipe or a socket answers; see SHM-3.
  if (seals < 0) {
    return Error(Code::kInvalidArgument, "descriptor: not a memfd", errno);
  }
  return seals & ~F_SEAL_EXEC;
}

Result<std::uint64_t> size_of(int fd) {
  struct stat status = {};
  if (::fstat(fd, &status) != 0) return os_error("descriptor: fstat", errno);
  return static_cast<std::uint64_t>(status.st_size);
}

Status check_length_sealed(const char* what, int fd, std::uint64_t bytes) {
  const auto seals = seals_of(fd);
  if (!seals) return seals.error();
  if (*seals != kLengthSeals) {
    return Error(Code::kInvalidArgument,
                 concat(what, ": seals are ", *seals, ", must be ", kLengthSeals));
  }
  const auto size = size_of(fd);
  if (!size) return size.error();
  if (*size != bytes) {
    return Error(Code::kInvalidArgument, concat(what, ": has ", *size, " bytes, not ", bytes));
  }
  return ok();
}

Result<Mapping> map_shared(int fd, std::uint64_t bytes, std::uint64_t alignment) {
  const auto doing = [bytes] { return concat("mmap ", bytes, " bytes"); };
  // mmap() promises only 4 KiB, so take more address space than needed and keep the aligned middle.
  const std::uint64_t reserved_bytes = bytes + alignment;
  void* const reserved = ::mmap(nullptr, reserved_bytes, PROT_NONE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return os_error(doing(), errno);
  auto* const start = static_cast<std::byte*>(reserved);
  const auto address = reinterpret_cast<std::uintptr_t>(reserved);
  const std::uint64_t head_bytes = round_up(address, alignment) - address;
  std::byte* const middle = start + head_bytes;
  const std::uint64_t tail_bytes = reserved_bytes - head_bytes - round_up(bytes, kBlockBytes);

  if (::mmap(middle, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
    const int number = errno;
    (void)::munmap(reserved, reserved_bytes);
    return os_error(doing(), number);
  }
  if (head_bytes > 0) (void)::munmap(start, head_bytes);
  if (tail_bytes > 0) (void)::munmap(start + reserved_bytes - tail_bytes, tail_bytes);
  Mapping mapping(middle, bytes);

  // A data-loading worker must not write into the arena of its parent, nor keep it alive (SHM-15).
  if (::madvise(middle, bytes, MADV_DONTFORK) != 0) return os_error("madvise DONTFORK", errno);
  // Nobody wants 16 GiB of tensors in a core dump; a kernel that refuses changes nothing else.
  (void)::madvise(middle, bytes, MADV_DONTDUMP);
  return mapping;
}

Result<UniqueFd> make_sealed_memfd(const char* name, std::string_view bytes) {
  auto fd = make_memfd(name);
  if (!fd) return fd;
  std::string_view rest = bytes;
  while (!rest.empty()) {
    const ssize_t count = ::write(fd->get(), rest.data(), rest.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return os_error(concat("memfd: write ", bytes.size(), " bytes"), errno);
    rest.remove_prefix(static_cast<std::size_t>(count));
  }
  if (::fcntl(fd->get(), F_ADD_SEALS, kLengthSeals | F_SEAL_WRITE) != 0) {
    return os_error("memfd: F_ADD_SEALS", errno);
  }
  return fd;
}

Result<std::string> read_sealed_memfd(int fd, std::uint64_t bytes, std::uint64_t bytes_max) {
  if (bytes > bytes_max) {
    return Error(Code::kInvalidArgument,
                 concat("memfd: ", bytes, " bytes, at most ", bytes_max, " are allowed"));
  }
  const auto seals = seals_of(fd);
  if (!seals) return seals.error();
  constexpr int kNeeded = F_SEAL_SHRINK | F_SEAL_GROW;
  if ((*seals & kNeeded) != kNeeded) {
    return Error(Code::kInvalidArgument,
                 concat("memfd: seals are ", *seals, ", lengths must be sealed (", kNeeded, ")"));
  }
  const auto size = size_of(fd);
  if (!size) return size.error();
  if (*size != bytes) {
    return Error(Code::kInvalidArgument, concat("memfd: has ", *size, " bytes, not ", bytes));
  }
  // pread(), not a mapping: it answers where a mapping would raise SIGBUS, and reads each byte
  // once.
  std::string text(bytes, '\0');
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t count =
        ::pread(fd, text.data() + done, text.size() - done, static_cast<off_t>(done));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      // Such as a descriptor that is open for writing alone.
      return Error(Code::kInvalidArgument, concat("memfd: cannot read at ", done),
                   count < 0 ? errno : 0);
    }
    done += static_cast<std::size_t>(count);
  }
  return text;
}

}  // namespace stillframe::shm
