#include <algorithm>
#include <set>

#include "base/step.h"
#include "base/text.h"
#include "catalog/change.h"
#include "catalog/run_files.h"
#include "format/names.h"

namespace stillframe::catalog {

namespace {

// Points RUN/NAME to a checkpoint, or takes it away; never touches what is not a link.
void point_link(uring::IoBackend& io, const std::string& run_path, std::string_view name,
                const Checkpoint* checkpoint) {
  const std::string path = concat(run_path, '/', name);
  auto status = io.status(path);
  if (status && status->kind != uring::FileKind::kSymlink) return;
  if (!status && status.error().code() != Code::kNotFound) return;
  if (checkpoint == nullptr) {
    if (status) (void)io.unlink(path);
    return;
  }
  const std::string unfinished = concat(private_path(run_path), '/', name, kUnfinishedMark);
  (void)unlink_if_there(io, unfinished);
  STEP("links: make link");
  if (!io.make_symlink(last_component(checkpoint->path), unfinished)) return;
  STEP("links: rename link");
  if (!io.rename(unfinished, path, uring::RenameMode::kReplace)) (void)io.unlink(unfinished);
}

}  // namespace

std::vector<const Checkpoint*> choose_victims(const RunContents& contents,
                                              const RetentionPolicy& policy) {
  std::vector<const Checkpoint*> victims;
  // A tag that cannot be read may protect any of them.
  if (policy.keep_last == 0 || !contents.damaged_tags.empty()) return victims;
  if (contents.checkpoints.size() <= policy.keep_last) return victims;

  std::set<const Checkpoint*> best;
  for (const BestKeep& keep : policy.best) {
    auto ranked = contents.ranked(keep.rule);
    ranked.resize(std::min<std::size_t>(ranked.size(), keep.count));
    best.insert(ranked.begin(), ranked.end());
  }
  const auto is_kept = [&](const Checkpoint& checkpoint) {
    const bool is_every =
        policy.keep_every != 0 && checkpoint.manifest.step % policy.keep_every == 0;
    return is_every || !checkpoint.tags.empty() || best.contains(&checkpoint);
  };

  const std::size_t old_count = contents.checkpoints.size() - policy.keep_last;
  for (std::size_t i = 0; i < old_count; ++i) {
    const Checkpoint& checkpoint = contents.checkpoints[i];
    if (!is_kept(checkpoint)) victims.push_back(&checkpoint);
  }
  return victims;
}

void refresh_links(uring::IoBackend& io, const RunContents& contents) {
  point_link(io, contents.path, "latest", contents.newest());
  point_link(io, contents.path, "best", contents.best());
}

}  // namespace stillframe::catalog
