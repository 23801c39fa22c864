#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/mapping.h"
#include "base/result.h"
#include "base/rng.h"
#include "uring/io_backend.h"

namespace stillframe::cli {

// What the process ends with. Scripts depend on these numbers.
enum class Exit : std::uint8_t { kDone = 0, kFailed = 1, kUsage = 2, kNotFound = 3, kDamaged = 4 };

// Flags that every command takes.
struct Options {
  bool as_json = false;
  std::string socket_path;  // Empty: the usual look-up.
};

// What the commands work with: the disk, the clock, standard output. One thread.
class Tool {
 public:
  explicit Tool(Options options);

  const Options& options() const noexcept { return options_; }
  const Clock& clock() const noexcept { return clock_; }
  Rng& rng() noexcept { return rng_; }

  // Made at the first call. Whoever looks at the daemon only needs none.
  Result<uring::IoBackend*> io();
  // 16 MiB for reading parts, aligned as O_DIRECT wants it. Made at the first call.
  Result<Bytes> staging();

  // Standard output. Errors go to standard error, by main() alone.
  template <class... Args>
  void print(fmt::format_string<Args...> format, Args&&... args) {
    write(fmt::format(format, std::forward<Args>(args)...));
  }
  void write(std::string_view text);
  // kUnavailable: some of what was written did not arrive (a full disk, a closed pipe).
  Status flush();

  // Colour on a terminal, unless NO_COLOR is set; the plain text elsewhere.
  std::string good(std::string_view text) const { return painted(text, "32"); }
  std::string bad(std::string_view text) const { return painted(text, "31"); }

 private:
  std::string painted(std::string_view text, std::string_view colour) const;

  Options options_;
  SystemClock clock_;
  SystemRng rng_;
  std::unique_ptr<uring::IoBackend> io_;
  Mapping staging_;
  bool has_colour_ = false;
  bool has_failed_output_ = false;
};

// A command line that was understood: what is left to do.
using Action = std::function<Result<Exit>(Tool&)>;

}  // namespace stillframe::cli
