#include "cli/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "base/clock.h"
#include "cli/text.h"

namespace stillframe::cli {

namespace {

constexpr std::int64_t kDrawEveryNs = 100'000'000;
constexpr int kBarCells = 24;

}  // namespace

ProgressBar::ProgressBar(std::string what, std::uint64_t total_bytes)
    : what_(std::move(what)),
      total_bytes_(total_bytes),
      begin_ns_(SystemClock().monotonic_ns()),
      is_shown_(::isatty(STDERR_FILENO) == 1) {}

ProgressBar::~ProgressBar() {
  if (is_shown_ && drawn_ns_ != 0) std::fputs("\r\x1b[K", stderr);
}

void ProgressBar::add(std::uint64_t bytes) {
  done_bytes_ += bytes;
  if (!is_shown_) return;
  const std::int64_t now_ns = SystemClock().monotonic_ns();
  if (now_ns - drawn_ns_ < kDrawEveryNs) return;
  drawn_ns_ = now_ns;
  // Padding is counted as well, so the sum can pass the total by a little.
  const double seconds = static_cast<double>(std::max<std::int64_t>(now_ns - begin_ns_, 1)) / 1e9;
  const double done = static_cast<double>(std::min(done_bytes_, total_bytes_));
  const double total = static_cast<double>(std::max<std::uint64_t>(total_bytes_, 1));
  const int cells = static_cast<int>(kBarCells * done / total);
  const std::string bar(static_cast<std::size_t>(cells), '#');
  fmt::print(stderr, "\r{} [{:<{}}] {} of {}, {:.2f} GB/s, {:.0f} s left\x1b[K", what_, bar,
             kBarCells, human_bytes(done_bytes_), human_bytes(total_bytes_), done / seconds / 1e9,
             (total - done) * seconds / std::max(done, 1.0));
  std::fflush(stderr);
}

}  // namespace stillframe::cli
