#include "tests/support/process_facts.h"

#include <filesystem>
#include <fstream>
#include <string>

namespace stillframe::testing {

std::size_t descriptor_count(pid_t pid) {
  std::size_t count = 0;
  std::error_code ignored;
  const std::string path = "/proc/" + std::to_string(pid) + "/fd";
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(path, ignored)) {
    ++count;
  }
  return count;
}

std::int64_t own_memory_kib(pid_t pid) {
  std::ifstream status("/proc/" + std::to_string(pid) + "/status");
  for (std::string word; status >> word;) {
    if (word != "RssAnon:") continue;
    std::int64_t kib = 0;
    status >> kib;
    return kib;
  }
  return 0;
}

}  // namespace stillframe::testing
