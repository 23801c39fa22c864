#include "client/temporary.h"

#include <algorithm>
#include <string_view>

#include "base/hash.h"
#include "base/text.h"
#include "catalog/run_files.h"

namespace stillframe::client {

namespace {

constexpr std::string_view kPrefix = ".stillframe-tmp-";
constexpr std::size_t kNonceDigits = 16;

bool is_temporary(std::string_view name) {
  if (!name.starts_with(kPrefix) || name.size() != kPrefix.size() + kNonceDigits) return false;
  return std::ranges::all_of(name.substr(kPrefix.size()), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
  });
}

// A writer keeps its files open until they have their final names, so nobody can lease them.
bool is_abandoned(uring::IoBackend& io, const std::string& path) {
  auto file = io.open(path, uring::OpenMode::kWriteDirect);
  if (!file) return false;
  const auto taken = io.take_for_writing(*file);
  io.close(*file);
  return taken && *taken;
}

// One without any part may have been made this very moment.
bool is_abandoned_directory(uring::IoBackend& io, const std::string& path) {
  auto entries = io.list_directory(path);
  if (!entries) return false;
  bool has_part = false;
  for (const uring::DirectoryEntry& entry : *entries) {
    if (!entry.name.ends_with(".safetensors")) continue;
    if (!is_abandoned(io, concat(path, '/', entry.name))) return false;
    has_part = true;
  }
  return has_part;
}

}  // namespace

std::string temporary_path(const std::string& parent, std::uint64_t nonce) {
  return concat(parent == "/" ? "" : parent, '/', kPrefix, to_hex(nonce));
}

void remove_stale_temporaries(uring::IoBackend& io, const std::string& parent) {
  auto entries = io.list_directory(parent);
  if (!entries) return;
  for (const uring::DirectoryEntry& entry : *entries) {
    if (!is_temporary(entry.name)) continue;
    const std::string path = concat(parent == "/" ? "" : parent, '/', entry.name);
    if (entry.kind == uring::FileKind::kRegular && is_abandoned(io, path)) {
      (void)io.unlink(path);
    } else if (entry.kind == uring::FileKind::kDirectory && is_abandoned_directory(io, path)) {
      catalog::remove_files(io, path);
    }
  }
}

}  // namespace stillframe::client
