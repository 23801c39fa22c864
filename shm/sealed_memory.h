#pragma once

// The memfds that cross the socket, and their seals.

#include <fcntl.h>

#include <cstdint>

#include "base/mapping.h"
#include "base/result.h"
#include "base/unique_fd.h"

namespace stillframe::shm {

// Fixes the length and the seals, leaves the contents writable: arenas and rings.
inline constexpr int kLengthSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

// An empty memfd that may be sealed, close-on-exec. `extra_flags`: MFD_HUGETLB and its size.
Result<UniqueFd> make_memfd(const char* name, unsigned extra_flags = 0);

// Sets the length of a memfd that make_memfd() made, then its seals.
Status set_length_and_seal(int fd, std::uint64_t bytes, int seals);

// The seals of what a peer sent. kInvalidArgument: it is no memfd at all. F_SEAL_EXEC is left out:
// it says only that the file cannot be made executable, and depends on vm.memfd_noexec.
Result<int> seals_of(int fd);
// The size of what a peer sent.
Result<std::uint64_t> size_of(int fd);

// kInvalidArgument unless `fd` is a memfd with kLengthSeals, no other, and `bytes` long.
Status check_length_sealed(const char* what, int fd, std::uint64_t bytes);

// Maps the whole memfd for reading and writing at an address that is a multiple of `alignment`, a
// power of two; forked children do not get it, core dumps leave it out.
Result<Mapping> map_shared(int fd, std::uint64_t bytes, std::uint64_t alignment);

}  // namespace stillframe::shm
