#include "base/step.h"

#ifdef STILLFRAME_FAULTS

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <string_view>

namespace stillframe {

namespace {

std::string_view from_environment(const char* name) noexcept {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string_view() : std::string_view(value);
}

long number_after_colon(std::string_view text) noexcept {
  return std::strtol(text.data() + text.find(':') + 1, nullptr, 10);
}

void trace(std::string_view path, unsigned hit, const char* name) noexcept {
  char line[160];
  const int bytes = std::snprintf(line, sizeof line, "%u %s\n", hit, name);
  const int fd = ::open(path.data(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (fd < 0) return;
  (void)!::write(fd, line, static_cast<std::size_t>(bytes));
  (void)::close(fd);
}

}  // namespace

int step_hit(const char* name) noexcept {
  // The count is of the whole process, so it cannot live in any object; fault builds only.
  static std::atomic<unsigned> hits = 0;

  const std::string_view only = from_environment("STILLFRAME_STEP_ONLY");
  if (!only.empty() && only != name) return 0;
  const unsigned hit = ++hits;
  if (const auto path = from_environment("STILLFRAME_STEP_TRACE"); !path.empty()) {
    trace(path, hit, name);
  }
  const std::string_view at = from_environment("STILLFRAME_STEP_AT");
  if (at.empty()) return 0;
  const auto target = static_cast<unsigned>(std::strtoul(at.data(), nullptr, 10));
  const std::string_view what = from_environment("STILLFRAME_STEP_DO");
  if (what.starts_with("errors:") && hit >= target) {
    return static_cast<int>(number_after_colon(what));
  }
  if (hit != target) return 0;
  if (what.starts_with("error:")) return static_cast<int>(number_after_colon(what));
  if (what.starts_with("sleep:")) {
    const long ms = number_after_colon(what);
    const timespec pause{.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1'000'000};
    (void)::nanosleep(&pause, nullptr);
    return 0;
  }
  (void)::kill(::getpid(), what == "stop" ? SIGSTOP : SIGKILL);
  return 0;
}

}  // namespace stillframe

#endif
