#include "tests/support/freezer.h"

#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <sstream>

namespace stillframe::testing {

namespace {

constexpr int kPatienceMs = 5'000;

}  // namespace

Freezer::Freezer() {
  std::ifstream mounts("/proc/mounts");
  for (std::string line; std::getline(mounts, line);) {
    std::istringstream words(line);
    std::string device;
    std::string place;
    std::string type;
    std::string options;
    words >> device >> place >> type >> options;
    const bool is_version_1 =
        type == "cgroup" && ("," + options + ",").find(",freezer,") != std::string::npos;
    if (!is_version_1 && type != "cgroup2") continue;
    const std::string group = place + "/stillframe-test-" + std::to_string(::getpid());
    if (::mkdir(group.c_str(), 0700) != 0) continue;
    if (::access((group + (is_version_1 ? "/freezer.state" : "/cgroup.freeze")).c_str(), W_OK) ==
        0) {
      group_ = group;
      is_version_1_ = is_version_1;
      return;
    }
    (void)::rmdir(group.c_str());
  }
  missing_ = "no cgroup with a freezer can be made here";
}

Freezer::~Freezer() {
  if (group_.empty()) return;
  (void)thaw();
  (void)::rmdir(group_.c_str());
}

bool Freezer::freeze(pid_t pid) {
  if (!write("cgroup.procs", std::to_string(pid)) ||
      !(is_version_1_ ? write("freezer.state", "FROZEN") : write("cgroup.freeze", "1"))) {
    return false;
  }
  for (int i = 0; i < kPatienceMs && !is_frozen(); ++i) (void)::usleep(1'000);
  return is_frozen();
}

bool Freezer::thaw() {
  return is_version_1_ ? write("freezer.state", "THAWED") : write("cgroup.freeze", "0");
}

bool Freezer::write(const std::string& file, const std::string& text) const {
  std::ofstream out(group_ + "/" + file);
  out << text << std::flush;
  return out.good();
}

bool Freezer::is_frozen() const {
  std::ifstream in(group_ + (is_version_1_ ? "/freezer.state" : "/cgroup.events"));
  for (std::string line; std::getline(in, line);) {
    if (line == (is_version_1_ ? "FROZEN" : "frozen 1")) return true;
  }
  return false;
}

}  // namespace stillframe::testing
