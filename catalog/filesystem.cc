// Which file systems keep what they promised. Numbers are those of statfs(2) and linux/magic.h.
#include <sys/vfs.h>

#include <cerrno>

#include "base/os_error.h"
#include "base/text.h"
#include "catalog/run_files.h"
#include "catalog/run_lock.h"

namespace stillframe::catalog {

namespace {

using Kind = FilesystemVerdict::Kind;

struct KnownFilesystem {
  std::uint64_t magic;
  Kind kind;
  const char* name;
};

constexpr KnownFilesystem kKnown[] = {
    {0xEF53, Kind::kDurable, "ext4"},  // ext2 and ext3 have the same number.
    {0x58465342, Kind::kDurable, "xfs"},      {0x9123683E, Kind::kDurable, "btrfs"},
    {0x2FC12FC1, Kind::kDurable, "zfs"},      {0xF2F52010, Kind::kDurable, "f2fs"},
    {0xCA451A4E, Kind::kDurable, "bcachefs"}, {0x3153464A, Kind::kDurable, "jfs"},

    {0x794C7630, Kind::kWarned, "overlay"},   {0x65735546, Kind::kWarned, "fuse"},
    {0x01021994, Kind::kWarned, "tmpfs"},     {0x858458F6, Kind::kWarned, "ramfs"},
    {0x61756673, Kind::kWarned, "aufs"},      {0xF15F, Kind::kWarned, "ecryptfs"},
    {0x4D44, Kind::kWarned, "vfat"},          {0x2011BAB0, Kind::kWarned, "exfat"},
    {0x7366746E, Kind::kWarned, "ntfs3"},

    {0x6969, Kind::kRefused, "nfs"},          {0x517B, Kind::kRefused, "smb"},
    {0xFF534D42, Kind::kRefused, "cifs"},     {0xFE534D42, Kind::kRefused, "smb2"},
    {0x00C36400, Kind::kRefused, "ceph"},     {0x0BD00BD0, Kind::kRefused, "lustre"},
    {0x47504653, Kind::kRefused, "gpfs"},     {0x19830326, Kind::kRefused, "beegfs"},
    {0x20030528, Kind::kRefused, "orangefs"}, {0xAAD7AAEA, Kind::kRefused, "panfs"},
    {0x5346414F, Kind::kRefused, "afs"},      {0x6B414653, Kind::kRefused, "afs"},
    {0x73757245, Kind::kRefused, "coda"},     {0x564C, Kind::kRefused, "ncp"},
    {0x01021997, Kind::kRefused, "9p"},       {0x786F4256, Kind::kRefused, "vboxsf"},
    {0x7461636F, Kind::kRefused, "ocfs2"},  // Shared disks: more than one node may write.
    {0x01161970, Kind::kRefused, "gfs2"},
};

}  // namespace

FilesystemVerdict judge_filesystem_magic(std::uint64_t magic) {
  for (const KnownFilesystem& known : kKnown) {
    if (known.magic == magic) return {.kind = known.kind, .name = known.name};
  }
  // Unknown is no reason to refuse a disk, and none to vouch for it.
  return {.kind = Kind::kWarned, .name = concat("file system ", magic)};
}

Result<FilesystemVerdict> judge_filesystem(const std::string& path) {
  std::string existing = path.empty() ? "." : path;
  for (;;) {
    struct statfs status = {};
    if (::statfs(existing.c_str(), &status) == 0) {
      // The field is signed on some platforms, and CIFS's number has the top bit of 32.
      return judge_filesystem_magic(static_cast<std::uint32_t>(status.f_type));
    }
    const int number = errno;
    const std::string parent = parent_of(existing);
    if (number == EINTR) continue;
    if (number != ENOENT || parent == existing) {
      return os_error(concat("statfs ", existing), number);
    }
    existing = parent;
  }
}

}  // namespace stillframe::catalog
