#include "shm/memory_left.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <iterator>
#include <limits>
#include <optional>
#include <string_view>

#include "base/bytes.h"
#include "base/text.h"

namespace stillframe::shm {

namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

// The names of one hierarchy's files; v1 and v2 have the same ideas under other names.
struct GroupFiles {
  const char* limit;
  const char* used;
  const char* inactive_cache;  // Rows of memory.stat.
  const char* active_cache;
};
constexpr GroupFiles kVersion1 = {"memory.limit_in_bytes", "memory.usage_in_bytes",
                                  "total_inactive_file", "total_active_file"};
constexpr GroupFiles kVersion2 = {"memory.max", "memory.current", "inactive_file", "active_file"};

// Empty when it cannot be read: each of these files may be missing on a healthy machine.
std::string read_text(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

// The number at the start of `text`, blanks before it skipped. "max" is none.
std::optional<std::uint64_t> leading_number(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
  std::uint64_t value = 0;
  const auto end = std::from_chars(text.data(), text.data() + text.size(), value);
  if (end.ec != std::errc()) return std::nullopt;
  return value;
}

// Of the line that begins with `key` and then a blank or colon.
std::optional<std::uint64_t> row(std::string_view text, std::string_view key) {
  while (!text.empty()) {
    const std::string_view line = text.substr(0, text.find('\n'));
    if (line.starts_with(key) && line.size() > key.size() &&
        (line[key.size()] == ' ' || line[key.size()] == ':')) {
      return leading_number(line.substr(key.size() + 1));
    }
    text.remove_prefix(std::min(line.size() + 1, text.size()));
  }
  return std::nullopt;
}

std::uint64_t left_in_group(const std::string& folder, const GroupFiles& names) {
  const auto limit = leading_number(read_text(concat(folder, "/", names.limit)));
  const auto used = leading_number(read_text(concat(folder, "/", names.used)));
  if (!limit || !used) return kUnlimited;
  const std::string stat = read_text(concat(folder, "/memory.stat"));
  const std::uint64_t cache =
      row(stat, names.inactive_cache).value_or(0) + row(stat, names.active_cache).value_or(0);
  const std::uint64_t held = *used - std::min(*used, cache);
  return *limit - std::min(*limit, held);
}

// The least of a group and all above it, up to the mount. In a container the path may be the
// host's, of which only the mount itself exists here: what is missing is passed over.
std::uint64_t left_up_from(const std::string& mount, std::string path, const GroupFiles& names) {
  std::uint64_t least = left_in_group(mount, names);
  while (!path.empty() && path != "/") {
    least = std::min(least, left_in_group(mount + path, names));
    path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
  }
  return least;
}

bool names_memory(std::string_view controllers) {
  while (true) {
    const std::size_t end = controllers.find(',');
    if (controllers.substr(0, end) == "memory") return true;
    if (end == std::string_view::npos) return false;
    controllers.remove_prefix(end + 1);
  }
}

// /proc/self/cgroup has lines "0::/path" for v2 and "7:memory:/path" for each controller of v1.
std::uint64_t left_in_groups(const MemoryFiles& files) {
  std::uint64_t least = kUnlimited;
  const std::string text = read_text(files.proc + "/self/cgroup");
  std::string_view rest = text;
  while (!rest.empty()) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(line.size() + 1, rest.size()));
    const std::size_t first = line.find(':');
    if (first == std::string_view::npos) continue;
    const std::size_t second = line.find(':', first + 1);
    if (second == std::string_view::npos) continue;
    const std::string_view controllers = line.substr(first + 1, second - first - 1);
    const std::string path(line.substr(second + 1));
    if (controllers.empty()) {
      least = std::min(least, left_up_from(files.cgroup, path, kVersion2));
    } else if (names_memory(controllers)) {
      least = std::min(least, left_up_from(files.cgroup + "/memory", path, kVersion1));
    }
  }
  return least;
}

}  // namespace

std::uint64_t memory_left(const MemoryFiles& files) {
  const auto available_kib = row(read_text(files.proc + "/meminfo"), "MemAvailable");
  const std::uint64_t available =
      available_kib ? checked_multiply(*available_kib, 1024).value_or(kUnlimited) : kUnlimited;
  return std::min(available, left_in_groups(files));
}

std::uint64_t hugetlb_pages_free(const MemoryFiles& files) {
  const std::string text = read_text(files.proc + "/meminfo");
  // The default size may be 1 GiB, whose pool these rows would then count.
  if (row(text, "Hugepagesize").value_or(0) * 1024 != kHugePageBytes) return 0;
  const std::uint64_t free = row(text, "HugePages_Free").value_or(0);
  return free - std::min(free, row(text, "HugePages_Rsvd").value_or(0));
}

}  // namespace stillframe::shm
