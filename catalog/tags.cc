#include <algorithm>
#include <utility>

#include "base/os_error.h"
#include "base/step.h"
#include "base/text.h"
#include "catalog/change.h"
#include "catalog/run_files.h"
#include "format/names.h"

namespace stillframe::catalog {

Status set_tag(uring::IoBackend& io, const std::string& run_path, const std::string& tag,
               std::uint64_t sequence) {
  auto allowed = format::check_tag(tag);
  if (!allowed) return allowed;
  auto contents = read_run(io, run_path);
  if (!contents) return std::move(contents).error();
  const format::Selector selector{.kind = format::Selector::Kind::kSequence, .sequence = sequence};
  auto checkpoint = select(*contents, selector);
  if (!checkpoint) return std::move(checkpoint).error();
  STEP("tag: write");
  return replace_file(io, tags_path(run_path), tag, sequence_text(sequence));
}

Status remove_tag(uring::IoBackend& io, const std::string& run_path, const std::string& tag) {
  auto allowed = format::check_tag(tag);
  if (!allowed) return allowed;
  STEP("tag: unlink");
  auto unlinked = io.unlink(concat(tags_path(run_path), '/', tag));
  if (!unlinked && unlinked.error().code() == Code::kNotFound) {
    return Error(Code::kNotFound, concat(run_path, " has no tag ", tag));
  }
  if (!unlinked) return unlinked;
  if (int e = STEP_ERROR("tag: sync directory"); e != 0) {
    return os_error(concat("fsync ", tags_path(run_path)), e);
  }
  return io.sync_directory(tags_path(run_path));
}

Result<bool> is_tagged(uring::IoBackend& io, const std::string& run_path, std::uint64_t sequence) {
  auto entries = io.list_directory(tags_path(run_path));
  if (!entries && entries.error().code() == Code::kNotFound) return false;
  if (!entries) return std::move(entries).error();
  for (const uring::DirectoryEntry& entry : *entries) {
    if (!format::check_tag(entry.name)) continue;
    auto text = read_small_file(io, concat(tags_path(run_path), '/', entry.name), kBlockBytes);
    const auto named = text ? parse_sequence_text(*text) : std::nullopt;
    if (!named || *named == sequence) return true;
  }
  return false;
}

}  // namespace stillframe::catalog
