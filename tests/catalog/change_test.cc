// Removal, recycling, recovery and tags, in a real directory.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "base/unique_fd.h"
#include "format/names.h"
#include "tests/catalog/catalog_test.h"
#include "tests/catalog/dying_backend.h"

namespace stillframe::catalog {
namespace {

using Sequences = std::vector<std::uint64_t>;
constexpr std::uint64_t kOwnNonce = 0x2222;

std::size_t index_of(const std::vector<std::string>& trace, const std::string& start) {
  const auto found = std::find_if(trace.begin(), trace.end(), [&start](const std::string& line) {
    return line.starts_with(start);
  });
  EXPECT_NE(found, trace.end()) << "no step begins with: " << start;
  return static_cast<std::size_t>(found - trace.begin());
}

class Retire : public CatalogTest {};
CATALOG_TEST_SUITE(Retire);

TEST_P(Retire, removes_the_checkpoint_and_keeps_its_parts_for_recycling) {
  const Checkpoint old = commit({.sequence = 1});
  const Checkpoint kept = commit({.sequence = 2});
  ASSERT_OK(retire(*io_, run_, old.path, kRoomySpool));
  EXPECT_FALSE(exists(old.path));
  EXPECT_EQ(spool_count(), 2u);
  EXPECT_EQ(sequences(), Sequences({2}));
  EXPECT_EQ(verify(kept), std::vector<std::string>());
}

TEST_P(Retire, follows_the_order_of_the_protocol) {
  const Checkpoint old = commit({.sequence = 1});
  commit({.sequence = 2});
  DyingBackend traced(*io_);
  ASSERT_OK(retire(traced, run_, old.path, kRoomySpool));
  const auto& trace = traced.trace();
  const std::size_t buried = index_of(trace, "rename " + old.path + "/manifest.json ");
  const std::size_t synced = index_of(trace, "sync " + old.path);
  const std::size_t first_part = index_of(trace, "rename " + old.path + "/part");
  const std::size_t sums = index_of(trace, "unlink " + old.path + "/manifest.sums");
  const std::size_t dead = index_of(trace, "unlink " + old.path + "/manifest.json.dead");
  const std::size_t removed = index_of(trace, "rmdir " + old.path);
  const std::size_t spool_synced = index_of(trace, "sync " + run_ + "/.stillframe/spool");
  EXPECT_EQ(buried, 0u);
  EXPECT_EQ(synced, 1u);
  EXPECT_GT(first_part, synced);
  EXPECT_GT(sums, synced);
  EXPECT_EQ(removed, dead + 1);
  EXPECT_GT(dead, sums);
  EXPECT_GT(spool_synced, removed);
  EXPECT_EQ(trace.back(), "sync " + run_);
}

TEST_P(Retire, touches_no_part_when_the_directory_cannot_be_synced) {
  const Checkpoint old = commit({.sequence = 1});
  commit({.sequence = 2});
  DyingBackend dying(*io_);
  dying.die_before(2);
  auto retired = retire(dying, run_, old.path, kRoomySpool);
  ASSERT_FALSE(retired);
  EXPECT_EQ(retired.error().code(), Code::kUnavailable);
  EXPECT_EQ(spool_count(), 0u);
  EXPECT_EQ(read_file(old.path + "/part0.safetensors"), part_bytes_for_test({.sequence = 1}, 0));
}

TEST_P(Retire, unlinks_what_the_limits_leave_no_room_for) {
  const Checkpoint first = commit({.sequence = 1, .tensor_bytes = {4096, 4096, 4096}});
  ASSERT_OK(
      retire(*io_, run_, first.path, {.file_count_max = 2, .bytes_max = std::uint64_t{1} << 30}));
  EXPECT_EQ(spool_count(), 2u);
  ASSERT_OK(empty_spool(*io_, run_));
  const Checkpoint second = commit({.sequence = 2, .tensor_bytes = {4096, 4096, 4096}});
  const std::uint64_t part_bytes = second.manifest.parts[0].bytes;
  ASSERT_OK(
      retire(*io_, run_, second.path, {.file_count_max = 8, .bytes_max = 2 * part_bytes + 1}));
  EXPECT_EQ(spool_count(), 2u);
  ASSERT_OK(empty_spool(*io_, run_));
  const Checkpoint third = commit({.sequence = 3});
  ASSERT_OK(retire(*io_, run_, third.path, SpoolLimits()));
  EXPECT_EQ(spool_count(), 0u);
  EXPECT_FALSE(exists(third.path));
}

TEST_P(Retire, the_newest_ones_sequence_is_not_used_again) {
  commit({.sequence = 1});
  const Checkpoint newest = commit({.sequence = 7});
  ASSERT_OK(retire(*io_, run_, newest.path, kRoomySpool));
  EXPECT_EQ(scan().next_sequence, 8u);
  ASSERT_OK(retire(*io_, run_, run_ + "/00000001-step-0", kRoomySpool));
  EXPECT_EQ(scan().next_sequence, 8u);
  EXPECT_EQ(scan().newest(), nullptr);
}

TEST_P(Retire, an_older_ones_sequence_is_not_recorded) {
  const Checkpoint old = commit({.sequence = 1});
  commit({.sequence = 2});
  ASSERT_OK(retire(*io_, run_, old.path, kRoomySpool));
  EXPECT_FALSE(exists(run_ + "/.stillframe/sequence"));
}

TEST_P(Retire, leaves_other_peoples_files_and_does_not_count_the_checkpoint) {
  const Checkpoint old = commit({.sequence = 1});
  commit({.sequence = 2});
  write_file(old.path + "/notes.txt", "mine");
  write_file(old.path + "/adapter.safetensors", "mine too");
  ASSERT_OK(retire(*io_, run_, old.path, kRoomySpool));
  EXPECT_EQ(read_file(old.path + "/notes.txt"), "mine");
  EXPECT_EQ(read_file(old.path + "/adapter.safetensors"), "mine too");
  EXPECT_FALSE(exists(old.path + "/part0.safetensors"));
  EXPECT_EQ(sequences(), Sequences({2}));
  EXPECT_TRUE(scan().damaged.empty());
  auto recovered = recover(*io_, run_, kOwnNonce);
  ASSERT_OK(recovered);
  EXPECT_TRUE(recovered->finished_victims.empty());
  std::filesystem::remove(old.path + "/notes.txt");
  std::filesystem::remove(old.path + "/adapter.safetensors");
  recovered = recover(*io_, run_, kOwnNonce);
  ASSERT_OK(recovered);
  EXPECT_EQ(recovered->finished_victims, std::vector<std::string>({"00000001-step-0"}));
  EXPECT_FALSE(exists(old.path));
}

TEST_P(Retire, removes_a_damaged_one_that_its_owner_names) {
  const Checkpoint broken = commit({.sequence = 1});
  const Checkpoint bare = commit({.sequence = 2});
  write_file(broken.path + "/manifest.json", "{}");
  std::filesystem::remove(bare.path + "/manifest.json");
  ASSERT_OK(retire(*io_, run_, broken.path, kRoomySpool));
  ASSERT_OK(retire(*io_, run_, bare.path, kRoomySpool));
  EXPECT_FALSE(exists(broken.path));
  EXPECT_FALSE(exists(bare.path));
}

TEST_P(Retire, refuses_what_is_not_a_checkpoint_of_the_run) {
  commit({.sequence = 1});
  const Checkpoint one = commit({.sequence = 2});
  std::filesystem::rename(one.path, directory_.path() + "/elsewhere");
  std::filesystem::create_symlink(directory_.path() + "/elsewhere", one.path);
  EXPECT_FALSE(retire(*io_, run_, one.path, kRoomySpool));
  EXPECT_FALSE(retire(*io_, run_, run_ + "/.stillframe", kRoomySpool));
  auto absent = retire(*io_, run_, run_ + "/00000009-step-0", kRoomySpool);
  ASSERT_FALSE(absent);
  EXPECT_EQ(absent.error().code(), Code::kNotFound);
  EXPECT_TRUE(exists(directory_.path() + "/elsewhere/manifest.json"));
}

// With two manifests the standing one is the truth, and a rescue by hand must not be undone.
TEST_P(Retire, a_dead_manifest_beside_a_standing_one_changes_nothing) {
  const Checkpoint one = commit({.sequence = 1});
  std::filesystem::copy(one.path + "/manifest.json", one.path + "/manifest.json.dead");
  auto recovered = recover(*io_, run_, kOwnNonce);
  ASSERT_OK(recovered);
  EXPECT_TRUE(recovered->finished_victims.empty());
  EXPECT_EQ(sequences(), Sequences({1}));
  EXPECT_EQ(verify(one), std::vector<std::string>());
  ASSERT_OK(retire(*io_, run_, one.path, kRoomySpool));
  EXPECT_FALSE(exists(one.path));
}

// M8: a kill before every single change.
TEST_P(Retire, killed_anywhere_leaves_the_victim_complete_or_invisible) {
  for (std::size_t change = 1;; ++change) {
    SCOPED_TRACE(concat("killed before change ", change));
    const std::uint64_t base = 10 * change;
    const Checkpoint kept = commit({.sequence = base});
    const Checkpoint old =
        commit({.sequence = base + 1});  // The newest: its floor is recorded too.
    DyingBackend dying(*io_);
    dying.die_before(change);
    const bool is_done = retire(dying, run_, old.path, kRoomySpool).has_value();

    const RunContents seen = scan();
    EXPECT_TRUE(seen.damaged.empty());
    if (seen.newest()->manifest.sequence == base + 1) {
      EXPECT_EQ(verify(old), std::vector<std::string>());
    }
    EXPECT_EQ(verify(kept), std::vector<std::string>());
    ASSERT_OK(recover(*io_, run_, kOwnNonce));
    const RunContents after = scan();
    EXPECT_TRUE(after.damaged.empty());
    EXPECT_EQ(after.checkpoints.size(), seen.checkpoints.size());
    EXPECT_GE(after.next_sequence, base + 2);
    auto again = recover(*io_, run_, kOwnNonce);
    ASSERT_OK(again);
    EXPECT_TRUE(again->finished_victims.empty());
    for (const Checkpoint& one : after.checkpoints) {
      ASSERT_OK(retire(*io_, run_, one.path, SpoolLimits()));
    }
    ASSERT_OK(empty_spool(*io_, run_));
    if (is_done) {
      EXPECT_GT(change, 8u);
      return;
    }
  }
}

TEST_P(Retire, recovery_killed_anywhere_is_finished_by_the_next) {
  for (std::size_t change = 1;; ++change) {
    SCOPED_TRACE(concat("killed before change ", change));
    const std::uint64_t base = 10 * change;
    const Checkpoint kept = commit({.sequence = base});
    const Checkpoint old = commit({.sequence = base + 1});
    commit({.sequence = base + 2});
    std::filesystem::rename(old.path + "/manifest.json", old.path + "/manifest.json.dead");
    const std::string temporary = run_ + "/.stillframe/tmp-00000099-0000000000001111";
    std::filesystem::create_directory(temporary);
    write_file(temporary + "/part0.safetensors", "half");
    write_file(run_ + "/.stillframe/tags/paper~", "1");

    DyingBackend dying(*io_);
    dying.die_before(change);
    const bool is_done = recover(dying, run_, kOwnNonce).has_value();
    EXPECT_TRUE(scan().damaged.empty());
    ASSERT_OK(recover(*io_, run_, kOwnNonce));
    EXPECT_EQ(sequences(), Sequences({base, base + 2}));
    EXPECT_FALSE(exists(old.path));
    EXPECT_FALSE(exists(temporary));
    EXPECT_FALSE(exists(run_ + "/.stillframe/tags/paper~"));
    EXPECT_EQ(spool_count(), 0u);
    for (const Checkpoint& one : scan().checkpoints) {
      ASSERT_OK(retire(*io_, run_, one.path, SpoolLimits()));
    }
    if (is_done) {
      EXPECT_GT(change, 6u);
      return;
    }
  }
}

class Recover : public CatalogTest {};
CATALOG_TEST_SUITE(Recover);

TEST_P(Recover, spares_its_own_temporaries_whatever_their_age) {
  const std::string own = run_ + "/.stillframe/tmp-00000001-0000000000002222";
  const std::string other = run_ + "/.stillframe/tmp-00000001-0000000000003333";
  for (const std::string& path : {own, other}) {
    std::filesystem::create_directory(path);
    write_file(path + "/part0.safetensors", "half");
  }
  std::filesystem::last_write_time(
      own, std::filesystem::file_time_type::clock::now() - std::chrono::hours(10000));
  auto recovered = recover(*io_, run_, kOwnNonce);
  ASSERT_OK(recovered);
  EXPECT_EQ(recovered->removed_temporaries,
            std::vector<std::string>({"tmp-00000001-0000000000003333"}));
  EXPECT_TRUE(exists(own + "/part0.safetensors"));
  EXPECT_FALSE(exists(other));
  EXPECT_EQ(spool_count(), 0u);
}

TEST_P(Recover, leaves_damaged_checkpoints_and_the_spool_alone) {
  const Checkpoint damaged = commit({.sequence = 1});
  std::filesystem::remove(damaged.path + "/manifest.json");
  const Checkpoint old = commit({.sequence = 2});
  commit({.sequence = 3});
  ASSERT_OK(retire(*io_, run_, old.path, kRoomySpool));
  auto recovered = recover(*io_, run_, kOwnNonce);
  ASSERT_OK(recovered);
  EXPECT_TRUE(recovered->finished_victims.empty());
  EXPECT_TRUE(exists(damaged.path + "/part0.safetensors"));
  EXPECT_EQ(spool_count(), 2u);
}

TEST_P(Recover, follows_no_link) {
  const std::string elsewhere = directory_.path() + "/elsewhere";
  std::filesystem::create_directory(elsewhere);
  write_file(elsewhere + "/precious", "x");
  write_file(elsewhere + "/manifest.json.dead", "x");
  std::filesystem::create_symlink(elsewhere, run_ + "/00000005-step-0");
  std::filesystem::create_symlink(elsewhere, run_ + "/.stillframe/tmp-00000001-0000000000003333");
  ASSERT_OK(recover(*io_, run_, kOwnNonce));
  EXPECT_TRUE(exists(elsewhere + "/precious"));
  EXPECT_TRUE(exists(elsewhere + "/manifest.json.dead"));
}

class SpoolFiles : public CatalogTest {
 protected:
  // Retires one checkpoint with parts of these sizes and leaves them in the spool.
  void fill(const std::vector<std::uint64_t>& tensor_bytes) {
    const Checkpoint old = commit({.sequence = 1, .tensor_bytes = tensor_bytes});
    ASSERT_OK(retire(*io_, run_, old.path, kRoomySpool));
    ASSERT_EQ(spool_count(), tensor_bytes.size());
  }
  // Length of the file that was taken, 0 for none.
  std::uint64_t take(std::uint64_t bytes) {
    const std::string target = directory_.path() + "/taken";
    auto taken = take_from_spool(*io_, run_, bytes, target);
    EXPECT_OK(taken);
    if (!taken || !*taken) return 0;
    auto status = io_->file_status(**taken);
    EXPECT_OK(status);
    io_->close(**taken);
    EXPECT_TRUE(exists(target));
    std::filesystem::remove(target);
    return status->bytes;
  }
  std::string spool_file() const {
    return std::filesystem::directory_iterator(run_ + "/.stillframe/spool")->path();
  }
};
CATALOG_TEST_SUITE(SpoolFiles);

constexpr std::uint64_t kHeader = 4096;  // Of a part with one tensor.

TEST_P(SpoolFiles, the_smallest_that_is_large_enough_is_taken_else_the_largest) {
  fill({100'000, 300'000, 200'000});
  EXPECT_EQ(take(150'000), kHeader + 200'000);
  EXPECT_EQ(take(150'000), kHeader + 300'000);
  EXPECT_EQ(take(150'000), kHeader + 100'000);
  EXPECT_EQ(take(150'000), 0u);
}

TEST_P(SpoolFiles, a_part_of_the_same_size_fits_though_its_length_is_not_whole_blocks) {
  fill({100'001, 900'000});
  EXPECT_EQ(take(round_up(kHeader + 100'001, kBlockBytes)), kHeader + 100'001);
}

// DUR-7, M12.
TEST_P(SpoolFiles, a_hard_linked_file_is_unlinked_and_not_reused) {
  fill({100'000});
  const std::string other_name = directory_.path() + "/delta.safetensors";
  std::filesystem::create_hard_link(spool_file(), other_name);
  EXPECT_EQ(take(100'000), 0u);
  EXPECT_EQ(spool_count(), 0u);
  EXPECT_EQ(read_file(other_name),
            part_bytes_for_test({.sequence = 1, .tensor_bytes = {100'000}}, 0));
}

TEST_P(SpoolFiles, a_part_with_another_name_never_enters_the_spool) {
  const Checkpoint old = commit({.sequence = 1, .tensor_bytes = {100'000}});
  const std::string other_name = directory_.path() + "/delta.safetensors";
  std::filesystem::create_hard_link(old.path + "/part0.safetensors", other_name);
  ASSERT_OK(retire(*io_, run_, old.path, kRoomySpool));
  EXPECT_EQ(spool_count(), 0u);
  EXPECT_TRUE(exists(other_name));
}

TEST_P(SpoolFiles, a_file_that_is_open_elsewhere_is_unlinked_and_not_reused) {
  fill({100'000});
  const UniqueFd reader(::open(spool_file().c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_TRUE(reader);
  EXPECT_EQ(take(100'000), 0u);
  EXPECT_EQ(spool_count(), 0u);
}

TEST_P(SpoolFiles, a_mapped_retired_part_never_changes) {
  const TestCommit wanted{.sequence = 1, .tensor_bytes = {100'000}};
  const Checkpoint old = commit(wanted);
  const std::string bytes = part_bytes_for_test(wanted, 0);
  UniqueFd reader(::open((old.path + "/part0.safetensors").c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_TRUE(reader);
  void* const address = ::mmap(nullptr, bytes.size(), PROT_READ, MAP_SHARED, reader.get(), 0);
  ASSERT_NE(address, MAP_FAILED);
  const Mapping mapped(address, bytes.size());
  reader = UniqueFd();

  ASSERT_OK(retire(*io_, run_, old.path, kRoomySpool));
  const Checkpoint next = commit({.sequence = 2, .tensor_bytes = {100'000}});
  EXPECT_EQ(verify(next), std::vector<std::string>());
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), static_cast<const char*>(address)));
}

TEST_P(SpoolFiles, an_opened_checkpoint_is_not_recycled_under_its_reader) {
  const TestCommit wanted{.sequence = 1, .tensor_bytes = {3'000'000}};
  const Checkpoint old = commit(wanted);
  auto opened = OpenCheckpoint::open(*io_, old);
  ASSERT_OK(opened);
  ASSERT_OK(retire(*io_, run_, old.path, kRoomySpool));
  commit({.sequence = 2, .tensor_bytes = {3'000'000}});
  BlockReader reader(*io_, *opened, {{.part = 0, .first_extent = 0, .extent_count = 3}},
                     staging_.bytes());
  const std::string bytes = part_bytes_for_test(wanted, 0);
  std::size_t read_bytes = 0;
  while (read_bytes < bytes.size()) {
    auto block = reader.next();
    ASSERT_OK(block);
    ASSERT_TRUE(*block);
    const Bytes read = (*block)->bytes;
    ASSERT_LE((*block)->offset + read.size(), bytes.size());
    EXPECT_EQ(std::memcmp(read.data(), bytes.data() + (*block)->offset, read.size()), 0);
    read_bytes += read.size();
    reader.recycle(**block);
  }
}

TEST_P(SpoolFiles, links_and_pipes_in_the_spool_are_unlinked_and_not_followed) {
  write_file(directory_.path() + "/precious", "x");
  std::filesystem::create_symlink(directory_.path() + "/precious", run_ + "/.stillframe/spool/1");
  ASSERT_EQ(::mkfifo((run_ + "/.stillframe/spool/2").c_str(), 0600), 0);
  EXPECT_EQ(take(100'000), 0u);
  EXPECT_EQ(spool_count(), 0u);
  EXPECT_EQ(read_file(directory_.path() + "/precious"), "x");
}

TEST_P(SpoolFiles, recycled_files_carry_the_new_checkpoint_and_nothing_else) {
  fill({100'000, 300'000});
  const Checkpoint next = commit({.sequence = 2, .tensor_bytes = {50'000, 400'000}});
  EXPECT_EQ(spool_count(), 0u);
  EXPECT_EQ(verify(next), std::vector<std::string>());
}

TEST_P(SpoolFiles, emptying_tells_the_bytes_it_freed) {
  fill({100'000, 300'000});
  auto freed = empty_spool(*io_, run_);
  ASSERT_OK(freed);
  EXPECT_EQ(*freed, 2 * kHeader + 400'000);
  EXPECT_EQ(spool_count(), 0u);
  freed = empty_spool(*io_, run_);
  ASSERT_OK(freed);
  EXPECT_EQ(*freed, 0u);
}

class Tags : public CatalogTest {};
CATALOG_TEST_SUITE(Tags);

TEST_P(Tags, name_a_checkpoint_move_and_go) {
  commit({.sequence = 1});
  commit({.sequence = 2});
  ASSERT_OK(set_tag(*io_, run_, "paper", 1));
  ASSERT_OK(set_tag(*io_, run_, "a", 1));
  EXPECT_EQ(scan().checkpoints[0].tags, std::vector<std::string>({"a", "paper"}));
  ASSERT_OK(set_tag(*io_, run_, "paper", 2));
  const RunContents contents = scan();
  auto found = select(contents, {.kind = format::Selector::Kind::kTag, .tag = "paper"});
  ASSERT_OK(found);
  EXPECT_EQ((*found)->manifest.sequence, 2u);
  ASSERT_OK(remove_tag(*io_, run_, "paper"));
  EXPECT_TRUE(scan().checkpoints[1].tags.empty());
  auto removed = remove_tag(*io_, run_, "paper");
  ASSERT_FALSE(removed);
  EXPECT_EQ(removed.error().code(), Code::kNotFound);
}

TEST_P(Tags, are_seen_at_the_last_moment_before_a_removal) {
  commit({.sequence = 1});
  commit({.sequence = 2});
  EXPECT_FALSE(*is_tagged(*io_, run_, 1));
  ASSERT_OK(set_tag(*io_, run_, "paper", 1));
  EXPECT_TRUE(*is_tagged(*io_, run_, 1));
  EXPECT_FALSE(*is_tagged(*io_, run_, 2));
  ASSERT_OK(remove_tag(*io_, run_, "paper"));
  EXPECT_FALSE(*is_tagged(*io_, run_, 1));
}

TEST_P(Tags, need_an_allowed_name_and_a_checkpoint) {
  commit({.sequence = 1});
  for (const char* tag : {"latest", "12", "step-5", "a/b", "..", "", "x~"}) {
    auto set = set_tag(*io_, run_, tag, 1);
    ASSERT_FALSE(set) << tag;
    EXPECT_EQ(set.error().code(), Code::kInvalidArgument) << tag;
  }
  auto set = set_tag(*io_, run_, "paper", 2);
  ASSERT_FALSE(set);
  EXPECT_EQ(set.error().code(), Code::kNotFound);
}

TEST_P(Tags, a_damaged_one_is_reported_and_stops_retention) {
  commit({.sequence = 1});
  commit({.sequence = 2});
  ASSERT_OK(set_tag(*io_, run_, "paper", 1));
  write_file(run_ + "/.stillframe/tags/paper", "1x\n");
  const RunContents contents = scan();
  EXPECT_EQ(contents.damaged_tags, std::vector<std::string>({"paper"}));
  EXPECT_TRUE(choose_victims(contents, {.keep_last = 1}).empty());
  auto found = select(contents, {.kind = format::Selector::Kind::kTag, .tag = "paper"});
  ASSERT_FALSE(found);
  EXPECT_EQ(found.error().code(), Code::kDataLoss);
}

TEST_P(Tags, one_on_a_damaged_checkpoint_says_so) {
  const Checkpoint one = commit({.sequence = 1});
  ASSERT_OK(set_tag(*io_, run_, "paper", 1));
  write_file(one.path + "/manifest.json", "{}");
  const RunContents contents = scan();
  auto found = select(contents, {.kind = format::Selector::Kind::kTag, .tag = "paper"});
  ASSERT_FALSE(found);
  EXPECT_EQ(found.error().code(), Code::kDataLoss);
}

TEST_P(Tags, killed_anywhere_names_the_old_checkpoint_or_the_new) {
  commit({.sequence = 1});
  commit({.sequence = 2});
  ASSERT_OK(set_tag(*io_, run_, "paper", 1));
  for (std::size_t change = 1;; ++change) {
    DyingBackend dying(*io_);
    dying.die_before(change);
    const bool is_done = set_tag(dying, run_, "paper", 2).has_value();
    const RunContents contents = scan();
    EXPECT_TRUE(contents.damaged_tags.empty());
    auto found = select(contents, {.kind = format::Selector::Kind::kTag, .tag = "paper"});
    ASSERT_OK(found);
    if (is_done) {
      EXPECT_EQ((*found)->manifest.sequence, 2u);
      EXPECT_GT(change, 4u);
      return;
    }
    ASSERT_OK(recover(*io_, run_, kOwnNonce));
    ASSERT_OK(set_tag(*io_, run_, "paper", 1));
  }
}

class Links : public CatalogTest {
 protected:
  std::string target(const std::string& link) const {
    return std::filesystem::read_symlink(run_ + "/" + link);
  }
};
CATALOG_TEST_SUITE(Links);

TEST_P(Links, point_to_latest_and_best_and_follow_them) {
  const format::BestRule rule{.metric = "loss", .mode = format::BestMode::kMin};
  commit({.sequence = 1, .metrics = {{"loss", 1}}, .best_rules = {rule}});
  const Checkpoint second = commit({.sequence = 2, .metrics = {{"loss", 2}}, .best_rules = {rule}});
  refresh_links(*io_, scan());
  EXPECT_EQ(target("latest"), "00000002-step-0");
  EXPECT_EQ(target("best"), "00000001-step-0");
  ASSERT_OK(retire(*io_, run_, second.path, SpoolLimits()));
  refresh_links(*io_, scan());
  EXPECT_EQ(target("latest"), "00000001-step-0");
  ASSERT_OK(retire(*io_, run_, run_ + "/00000001-step-0", SpoolLimits()));
  refresh_links(*io_, scan());
  EXPECT_FALSE(exists(run_ + "/latest"));
  EXPECT_FALSE(exists(run_ + "/best"));
}

TEST_P(Links, never_replace_what_is_not_a_link) {
  commit({.sequence = 1});
  write_file(run_ + "/latest", "mine");
  refresh_links(*io_, scan());
  EXPECT_EQ(read_file(run_ + "/latest"), "mine");
}

}  // namespace
}  // namespace stillframe::catalog
