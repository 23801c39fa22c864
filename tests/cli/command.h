#pragma once

// Runs the built `stillframe` and `stillframed` as processes, as a person or a script would.

#include <sys/types.h>

#include <boost/json.hpp>
#include <string>
#include <vector>

#include "base/unique_fd.h"

namespace stillframe::cli {

struct Outcome {
  int exit_code = -1;  // 128 + n: ended by signal n.
  std::string out;
  std::string err;

  // Of --json. A failed parse is null and shows in the expectation that follows.
  boost::json::value json() const;
  // What a person sees of an error: exactly one line.
  bool has_one_error_line() const;
};

Outcome stillframe(const std::vector<std::string>& arguments,
                   const std::vector<std::string>& variables = {});

// stillframed in the foreground until the end of the test.
class DaemonProcess {
 public:
  explicit DaemonProcess(const std::string& socket_path);
  DaemonProcess(const DaemonProcess&) = delete;
  DaemonProcess& operator=(const DaemonProcess&) = delete;
  ~DaemonProcess();
  pid_t pid() const noexcept { return pid_; }
  // False: it ended before it listened.
  bool wait_listening() const;

 private:
  std::string socket_path_;
  pid_t pid_ = -1;
};

}  // namespace stillframe::cli
