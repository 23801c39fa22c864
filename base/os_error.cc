#include "base/os_error.h"

#include <cerrno>
#include <system_error>

#include "base/text.h"

namespace stillframe {

namespace {

// The kernel's enum grows without us, hence the default.
Code code_for(int number) {
  switch (number) {
    case ENOSPC:
    case EDQUOT:
    case ENOMEM:
    case EMFILE:
    case ENFILE:
    case EFBIG:
    case EAGAIN: return Code::kResourceExhausted;
    case ENOENT: return Code::kNotFound;
    case EACCES:
    case EPERM:
    case EROFS:
    case EINVAL:
    case ENOTDIR:
    case EISDIR:
    case ELOOP:
    case ENAMETOOLONG:
    case EEXIST: return Code::kInvalidArgument;
    case EIO:
    case EPIPE:
    case ECONNRESET:
    case ECONNREFUSED:
    case ENOTCONN:
    case ETIMEDOUT:
    case ESTALE:
    case ENXIO:
    case ENODEV: return Code::kUnavailable;
    default: return Code::kInternal;
  }
}

}  // namespace

Error os_error(std::string_view doing, int number) {
  return Error(code_for(number), concat(doing, ": ", std::generic_category().message(number)),
               number);
}

}  // namespace stillframe
