// The calibrators from a shell:
//
//   raw_bench copy   [--mib N] [--threads N]
//   raw_bench write  --path FILE [--mib N] [--fresh]
//   raw_bench read   --path FILE [--mib N]
//   raw_bench commit --path DIRECTORY [--times N]
//
// Prints one line of JSON with seconds: for commit the median, for the rest one run after a
// warm-up.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "bench/raw/raw.h"

namespace {

struct Options {
  std::string what;
  std::string path;
  std::size_t mib = 1024;
  std::size_t threads = 1;
  std::size_t times = 200;
  bool fresh = false;
};

int usage() {
  std::fputs(
      "usage: raw_bench copy|write|read|commit [--path P] [--mib N] [--threads N] "
      "[--times N] [--fresh]\n",
      stderr);
  return 2;
}

double run(const Options& options) {
  const std::size_t bytes = options.mib << 20;
  if (options.what == "copy") {
    const raw::Memory source(bytes, 1);
    const raw::Memory target(bytes, 2);
    (void)raw::copy_seconds(target.data(), source.data(), bytes, options.threads);
    return raw::copy_seconds(target.data(), source.data(), bytes, options.threads);
  }
  if (options.what == "commit") {
    const raw::Memory memory(std::size_t{1} << 20);
    std::vector<double> seconds;
    for (std::size_t i = 0; i < options.times; ++i) {
      seconds.push_back(raw::commit_seconds(options.path, memory));
    }
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
  }
  raw::Memory memory(bytes);
  const raw::FileState state = options.fresh ? raw::FileState::kFresh : raw::FileState::kReused;
  (void)raw::write_seconds(options.path, memory, raw::FileState::kReused);
  return options.what == "write" ? raw::write_seconds(options.path, memory, state)
                                 : raw::read_seconds(options.path, memory);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return usage();
  Options options;
  options.what = argv[1];
  for (int i = 2; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--fresh") {
      options.fresh = true;
      continue;
    }
    if (i + 1 == argc) return usage();
    const char* const value = argv[++i];
    if (flag == "--path") {
      options.path = value;
    } else if (flag == "--mib") {
      options.mib = std::strtoul(value, nullptr, 10);
    } else if (flag == "--threads") {
      options.threads = std::strtoul(value, nullptr, 10);
    } else if (flag == "--times") {
      options.times = std::strtoul(value, nullptr, 10);
    } else {
      return usage();
    }
  }
  const bool known = options.what == "copy" || options.what == "write" || options.what == "read" ||
                     options.what == "commit";
  const bool needs_path = options.what != "copy";
  if (!known || (needs_path && options.path.empty()) || options.mib == 0 || options.threads == 0 ||
      options.times == 0) {
    return usage();
  }
  const double seconds = run(options);
  const std::size_t bytes = options.what == "commit" ? std::size_t{1} << 20 : options.mib << 20;
  std::printf(
      "{\"benchmark\": \"raw_%s%s\", \"bytes\": %zu, \"threads\": %zu, \"seconds\": %.9f}\n",
      options.what.c_str(), options.fresh ? "_fresh" : "", bytes, options.threads, seconds);
  return 0;
}
