#pragma once

// What lies on the simulated drive, and what a power cut makes of it.
//
// The fault model, stricter than ext4 and XFS, whose one journal stores more than POSIX promises:
//
// Every file has two images: what programs see, and what the drive keeps. fsync of the file makes
// its bytes and its length durable, not its name. A power cut leaves of what was not synced
//   - bytes: any subset of the 4 KiB blocks written since, some of them torn at 512-byte sectors;
//     often all or none of a file, which are subsets too;
//   - length: the old or the new one; what the new one adds and no block survived is zero;
//   - a failed fsync: nothing more. Its blocks, kept or dropped at random, count as synced, so that
//     a second fsync succeeds and stores nothing.
//
// Every directory entry has two images too, and all states in between: a power cut leaves each name
// as it was when its directory was last synced, or after any change since, each name for itself.
// Exceptions, which every file system that we support keeps:
//   - a rename inside one directory leaves the old or the new name, never both; an exchange counts
//     as two of them;
//   - a rename across two directories may leave both names of a file (its link count is then 2), of
//     a directory one;
//   - what had a durable name and was renamed keeps a name, unless the old name's removal was
//   synced
//     and the new name was not: the target directory is the one to sync first.
// A directory's own name says nothing about its contents, nor they about it.

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "tests/simulated/seeded_rng.h"
#include "uring/io_backend.h"

namespace stillframe::simulated {

using InodeNumber = std::uint64_t;  // 0: none.
inline constexpr InodeNumber kRootInode = 1;

struct Inode {
  uring::FileKind kind = uring::FileKind::kRegular;
  std::uint64_t link_count = 0;  // Names as programs see them.
  std::uint64_t open_count = 0;
  bool open_elsewhere = false;  // Set by a test: another process has it open or mapped.
  bool leased = false;

  // Of a regular file.
  std::vector<std::byte> bytes = {};          // As programs see it.
  std::vector<std::byte> durable_bytes = {};  // As the drive keeps it.
  std::set<std::uint64_t> dirty_blocks = {};  // Written since the last fsync, by index.

  // Of a directory: each name's states, the durable one first, the one that programs see last.
  std::map<std::string, std::vector<InodeNumber>> names = {};
};

// Where a path leads. `inode` is 0 when its last name does not exist; `error` is an errno when the
// way there does not.
struct Place {
  InodeNumber directory = 0;
  std::string name = {};
  InodeNumber inode = 0;
  int error = 0;
};

// Copyable, so that one state can be crashed many times. Functions return 0 or an errno.
class DriveImage {
 public:
  DriveImage();

  Place find(std::string_view path) const;
  Inode& at(InodeNumber inode) { return inodes_.at(inode); }
  const Inode& at(InodeNumber inode) const { return inodes_.at(inode); }

  InodeNumber create(const Place& place, uring::FileKind kind);
  int rename(const Place& source, const Place& target, uring::RenameMode mode);
  void set_name(InodeNumber directory, const std::string& name, InodeNumber inode);
  bool is_empty_directory(InodeNumber inode) const;

  void write(InodeNumber inode, std::uint64_t offset, ConstBytes bytes);
  void resize(InodeNumber inode, std::uint64_t bytes);
  void sync(InodeNumber inode);
  void fail_sync(InodeNumber inode, SeededRng& rng);
  void sync_directory(InodeNumber inode);

  std::uint64_t used_bytes() const;
  // Frees what no name, no open file and no power cut can bring back.
  void forget_unreachable();

  // The power cut. Open files and leases are gone.
  void crash(SeededRng& rng);

 private:
  struct NameState {
    InodeNumber directory = 0;
    std::string name;
    std::size_t state = 0;
  };
  using Picks = std::map<std::pair<InodeNumber, std::string>, std::size_t>;

  std::vector<NameState> names_of(InodeNumber inode) const;
  const std::vector<InodeNumber>& states(const NameState& name) const;
  void crash_names(SeededRng& rng);
  void keep_one_name(InodeNumber inode, Picks& picks, SeededRng& rng) const;
  bool keep_a_name(InodeNumber inode, Picks& picks, SeededRng& rng) const;
  std::vector<NameState> picked_names(InodeNumber inode, const Picks& picks) const;

  std::map<InodeNumber, Inode> inodes_;
  InodeNumber next_inode_ = kRootInode + 1;
};

}  // namespace stillframe::simulated
