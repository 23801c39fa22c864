#pragma once

#include <cstdint>
#include <string>

namespace stillframe::cli {

// One line on standard error that says how far a long command is: bytes, rate, time left. Only on a
// terminal; elsewhere it prints nothing.
class ProgressBar {
 public:
  ProgressBar(std::string what, std::uint64_t total_bytes);
  ~ProgressBar();  // Takes the line away again.
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void add(std::uint64_t bytes);

 private:
  std::string what_;
  std::uint64_t total_bytes_;
  std::uint64_t done_bytes_ = 0;
  std::int64_t begin_ns_;
  std::int64_t drawn_ns_ = 0;
  bool is_shown_;
};

}  // namespace stillframe::cli
