#include <gnu/libc-version.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdio>
#include <ctime>
#include <fstream>
#include <string>

#include "bench/rounds.h"

// What a later reader needs to know of the machine, without the names of hosts, users or paths.
namespace stillframe::bench {

namespace {

std::string first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  (void)std::getline(file, line);
  return line;
}

// The value of the first line of `path` that starts with `key`, as in /proc/cpuinfo.
std::string value_of(const char* path, std::string_view key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, key.size(), key) != 0) continue;
    const std::size_t colon = line.find(':');
    const std::size_t start = line.find_first_not_of(" \t", colon + 1);
    return start == std::string::npos ? std::string() : line.substr(start);
  }
  return {};
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts = {};
  (void)::gmtime_r(&now, &parts);
  char text[32];
  (void)std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

std::string host_json() {
  utsname names = {};
  (void)::uname(&names);
  rlimit memlock = {};
  (void)::getrlimit(RLIMIT_MEMLOCK, &memlock);
  const bool unlimited = memlock.rlim_cur == RLIM_INFINITY;
  return JsonLine()
      .add("cpu", value_of("/proc/cpuinfo", "model name"))
      .add("cpus", static_cast<std::uint64_t>(::sysconf(_SC_NPROCESSORS_ONLN)))
      .add("memory", value_of("/proc/meminfo", "MemTotal"))
      .add("kernel", names.release)
      .add("libc", ::gnu_get_libc_version())
      .add("hypervisor",
           value_of("/proc/cpuinfo", "flags").find(" hypervisor") != std::string::npos)
      .add("thp", first_line("/sys/kernel/mm/transparent_hugepage/enabled"))
      .add("shmem_thp", first_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled"))
      .add("huge_pages", value_of("/proc/meminfo", "HugePages_Total"))
      .add("memlock", unlimited ? std::string("unlimited") : std::to_string(memlock.rlim_cur))
      .add("load", first_line("/proc/loadavg"))
      .text();
}

}  // namespace

JsonLine header_line(std::string_view benchmark) {
  JsonLine line;
  line.add("kind", "header")
      .add("schema", 1)
      .add("benchmark", benchmark)
      .add("start", utc_now())
      .add("compiler", __VERSION__)
      .add("void_rule", "a calibrator's two runs in a round differ by more than 20 %")
      .add_json("host", host_json());
  return line;
}

}  // namespace stillframe::bench
