#include "tests/simulated/drive_image.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace stillframe::simulated {

namespace {

constexpr std::size_t kSectorBytes = 512;

void mark_dirty(Inode& file, std::uint64_t offset, std::uint64_t end) {
  for (std::uint64_t block = offset / kBlockBytes; block * kBlockBytes < end; ++block) {
    file.dirty_blocks.insert(block);
  }
}

// Copies what both have of [offset, offset + bytes).
void copy_range(const std::vector<std::byte>& source, std::vector<std::byte>& target,
                std::uint64_t offset, std::uint64_t bytes) {
  const std::uint64_t end =
      std::min({offset + bytes, std::uint64_t{source.size()}, std::uint64_t{target.size()}});
  if (offset < end) std::memcpy(target.data() + offset, source.data() + offset, end - offset);
}

void crash_file(Inode& file, SeededRng& rng) {
  const std::size_t bytes = rng.below(2) == 0 ? file.durable_bytes.size() : file.bytes.size();
  std::vector<std::byte> image = file.durable_bytes;
  image.resize(bytes);
  const std::uint64_t luck = rng.below(4);  // 0: all blocks survive; 1: none; else each for itself.
  for (const std::uint64_t block : file.dirty_blocks) {
    const std::uint64_t fate = luck < 2 ? luck : rng.below(4);
    if (fate == 0 || fate == 2) copy_range(file.bytes, image, block * kBlockBytes, kBlockBytes);
    if (fate != 3) continue;
    for (std::uint64_t sector = 0; sector < kBlockBytes; sector += kSectorBytes) {
      if (rng.below(2) == 0) {
        copy_range(file.bytes, image, block * kBlockBytes + sector, kSectorBytes);
      }
    }
  }
  file.bytes = image;
  file.durable_bytes = std::move(image);
  file.dirty_blocks.clear();
}

}  // namespace

DriveImage::DriveImage() {
  inodes_[kRootInode] = {.kind = uring::FileKind::kDirectory, .link_count = 1};
}

Place DriveImage::find(std::string_view path) const {
  Place place{.inode = kRootInode};
  while (!path.empty()) {
    const std::size_t end = std::min(path.find('/'), path.size());
    const std::string_view name = path.substr(0, end);
    path.remove_prefix(std::min(end + 1, path.size()));
    if (name.empty() || name == ".") continue;
    if (place.inode == 0) return {.error = ENOENT};
    const Inode& directory = at(place.inode);
    if (directory.kind != uring::FileKind::kDirectory) return {.error = ENOTDIR};
    place.directory = place.inode;
    place.name = name;
    const auto found = directory.names.find(place.name);
    place.inode = found == directory.names.end() ? 0 : found->second.back();
  }
  return place;
}

InodeNumber DriveImage::create(const Place& place, uring::FileKind kind) {
  const InodeNumber inode = next_inode_++;
  inodes_[inode].kind = kind;
  set_name(place.directory, place.name, inode);
  return inode;
}

void DriveImage::set_name(InodeNumber directory, const std::string& name, InodeNumber inode) {
  auto& name_states = at(directory).names[name];
  if (name_states.empty()) name_states.push_back(0);
  if (name_states.back() != 0) --at(name_states.back()).link_count;
  if (inode != 0) ++at(inode).link_count;
  name_states.push_back(inode);
}

int DriveImage::rename(const Place& source, const Place& target, uring::RenameMode mode) {
  if (source.inode == 0) return ENOENT;
  if (target.inode != 0 && mode == uring::RenameMode::kNoReplace) return EEXIST;
  if (target.inode == 0 && mode == uring::RenameMode::kExchange) return ENOENT;
  if (target.inode == source.inode) return 0;
  if (mode == uring::RenameMode::kExchange) {
    set_name(target.directory, target.name, source.inode);
    set_name(source.directory, source.name, target.inode);
    return 0;
  }
  if (target.inode != 0) {
    const bool from_directory = at(source.inode).kind == uring::FileKind::kDirectory;
    const bool onto_directory = at(target.inode).kind == uring::FileKind::kDirectory;
    if (from_directory && !onto_directory) return ENOTDIR;
    if (!from_directory && onto_directory) return EISDIR;
    if (onto_directory && !is_empty_directory(target.inode)) return ENOTEMPTY;
  }
  set_name(target.directory, target.name, source.inode);
  set_name(source.directory, source.name, 0);
  return 0;
}

bool DriveImage::is_empty_directory(InodeNumber inode) const {
  const auto& names = at(inode).names;
  return std::all_of(names.begin(), names.end(),
                     [](const auto& entry) { return entry.second.back() == 0; });
}

void DriveImage::write(InodeNumber inode, std::uint64_t offset, ConstBytes bytes) {
  Inode& file = at(inode);
  if (file.bytes.size() < offset + bytes.size()) resize(inode, offset + bytes.size());
  std::copy(bytes.begin(), bytes.end(), file.bytes.begin() + static_cast<std::ptrdiff_t>(offset));
  mark_dirty(file, offset, offset + bytes.size());
}

void DriveImage::resize(InodeNumber inode, std::uint64_t bytes) {
  Inode& file = at(inode);
  // Zeros that were not there before count as written: older bytes may lie under them.
  mark_dirty(file, std::min<std::uint64_t>(bytes, file.bytes.size()),
             std::max<std::uint64_t>(bytes, file.bytes.size()));
  file.bytes.resize(bytes);
}

void DriveImage::sync(InodeNumber inode) {
  Inode& file = at(inode);
  file.durable_bytes.resize(file.bytes.size());
  for (const std::uint64_t block : file.dirty_blocks) {
    copy_range(file.bytes, file.durable_bytes, block * kBlockBytes, kBlockBytes);
  }
  file.dirty_blocks.clear();
}

void DriveImage::fail_sync(InodeNumber inode, SeededRng& rng) {
  Inode& file = at(inode);
  for (const std::uint64_t block : file.dirty_blocks) {
    if (rng.below(2) == 0) {
      copy_range(file.bytes, file.durable_bytes, block * kBlockBytes, kBlockBytes);
    }
  }
  file.dirty_blocks.clear();
}

void DriveImage::sync_directory(InodeNumber inode) {
  auto& names = at(inode).names;
  for (auto& [name, name_states] : names) name_states = {name_states.back()};
  std::erase_if(names, [](const auto& entry) { return entry.second.back() == 0; });
  forget_unreachable();
}

std::uint64_t DriveImage::used_bytes() const {
  std::uint64_t used_bytes = 0;
  for (const auto& [number, inode] : inodes_) {
    if (inode.link_count > 0 || inode.open_count > 0) {
      used_bytes += round_up(inode.bytes.size(), kBlockBytes);
    }
  }
  return used_bytes;
}

void DriveImage::forget_unreachable() {
  std::set<InodeNumber> reached;
  std::vector<InodeNumber> next = {kRootInode};
  for (const auto& [number, inode] : inodes_) {
    if (inode.open_count > 0) next.push_back(number);
  }
  while (!next.empty()) {
    const InodeNumber inode = next.back();
    next.pop_back();
    if (inode == 0 || !reached.insert(inode).second) continue;
    for (const auto& [name, name_states] : at(inode).names) {
      next.insert(next.end(), name_states.begin(), name_states.end());
    }
  }
  std::erase_if(inodes_, [&](const auto& entry) { return !reached.contains(entry.first); });
}

void DriveImage::crash(SeededRng& rng) {
  crash_names(rng);
  for (auto& [number, inode] : inodes_) {
    inode.open_count = 0;
    inode.open_elsewhere = false;
    inode.leased = false;
    inode.link_count = number == kRootInode ? 1 : 0;
  }
  for (const auto& [number, inode] : inodes_) {
    for (const auto& [name, name_states] : inode.names) ++at(name_states.back()).link_count;
  }
  forget_unreachable();
  for (auto& [number, inode] : inodes_) {
    if (inode.kind == uring::FileKind::kRegular) crash_file(inode, rng);
    // A link's text is stored with its name.
    inode.durable_bytes = inode.bytes;
  }
}

void DriveImage::crash_names(SeededRng& rng) {
  Picks picks;
  for (const auto& [number, inode] : inodes_) {
    for (const auto& [name, name_states] : inode.names) {
      picks[{number, name}] = rng.below(name_states.size());
    }
  }
  for (const auto& [number, inode] : inodes_) keep_one_name(number, picks, rng);
  // Giving one inode its name back may take another's; a few rounds settle nearly every tangle, and
  // what programs saw last is always an answer.
  bool settled = false;
  for (int round = 0; round < 16 && !settled; ++round) {
    settled = true;
    for (const auto& [number, inode] : inodes_) {
      if (!keep_a_name(number, picks, rng)) settled = false;
    }
  }
  for (auto& [number, inode] : inodes_) {
    for (auto& [name, name_states] : inode.names) {
      const std::size_t pick = settled ? picks[{number, name}] : name_states.size() - 1;
      name_states = {name_states[pick]};
    }
    std::erase_if(inode.names, [](const auto& entry) { return entry.second.back() == 0; });
  }
}

// Of several names that survived, a directory keeps one, a file one in each directory.
void DriveImage::keep_one_name(InodeNumber inode, Picks& picks, SeededRng& rng) const {
  for (;;) {
    const std::vector<NameState> names = picked_names(inode, picks);
    const NameState* extra = nullptr;
    for (const NameState& a : names) {
      for (const NameState& b : names) {
        const bool same_directory = a.directory == b.directory;
        if (&a == &b || (at(inode).kind != uring::FileKind::kDirectory && !same_directory)) {
          continue;
        }
        extra = rng.below(2) == 0 ? &a : &b;
      }
    }
    if (extra == nullptr) return;
    // To a state of that name before or after this inode bore it.
    const auto& name_states = states(*extra);
    if (std::count(name_states.begin(), name_states.end(), inode) ==
        static_cast<std::ptrdiff_t>(name_states.size())) {
      return;  // A durable second name, left by an earlier crash.
    }
    std::size_t pick = extra->state;
    while (name_states[pick] == inode) pick = pick == 0 ? name_states.size() - 1 : pick - 1;
    picks[{extra->directory, extra->name}] = pick;
  }
}

// What has a durable name and still has one for programs must not end without. True when it had.
bool DriveImage::keep_a_name(InodeNumber inode, Picks& picks, SeededRng& rng) const {
  if (at(inode).link_count == 0 || !picked_names(inode, picks).empty()) return true;
  const std::vector<NameState> names = names_of(inode);
  const bool is_durable = std::any_of(names.begin(), names.end(),
                                      [](const NameState& name) { return name.state == 0; });
  if (!is_durable) return true;
  const NameState& kept = names[rng.below(names.size())];
  picks[{kept.directory, kept.name}] = kept.state;
  return false;
}

// Every state of every name in which it means this inode.
std::vector<DriveImage::NameState> DriveImage::names_of(InodeNumber inode) const {
  std::vector<NameState> found;
  for (const auto& [number, directory] : inodes_) {
    for (const auto& [name, name_states] : directory.names) {
      for (std::size_t state = 0; state < name_states.size(); ++state) {
        if (name_states[state] == inode) found.push_back({number, name, state});
      }
    }
  }
  return found;
}

std::vector<DriveImage::NameState> DriveImage::picked_names(InodeNumber inode,
                                                            const Picks& picks) const {
  std::vector<NameState> found = names_of(inode);
  std::erase_if(found, [&](const NameState& name) {
    return picks.at({name.directory, name.name}) != name.state;
  });
  return found;
}

const std::vector<InodeNumber>& DriveImage::states(const NameState& name) const {
  return at(name.directory).names.at(name.name);
}

}  // namespace stillframe::simulated
