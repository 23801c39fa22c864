// What a scan finds in a run directory, and what it must not believe.
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <limits>

#include "format/names.h"
#include "tests/catalog/catalog_test.h"

namespace stillframe::catalog {
namespace {

class Scan : public CatalogTest {};
CATALOG_TEST_SUITE(Scan);

using Kind = format::Selector::Kind;

TEST_P(Scan, a_path_that_does_not_exist_is_an_empty_run) {
  auto contents = read_run(*io_, directory_.path() + "/nowhere");
  ASSERT_OK(contents);
  EXPECT_EQ(contents->run_id, "");
  EXPECT_TRUE(contents->checkpoints.empty());
  EXPECT_EQ(contents->next_sequence, 1u);
}

TEST_P(Scan, a_file_is_not_a_run) {
  write_file(directory_.path() + "/file", "x");
  auto contents = read_run(*io_, directory_.path() + "/file");
  ASSERT_FALSE(contents);
  EXPECT_EQ(contents.error().code(), Code::kInvalidArgument);
}

TEST_P(Scan, a_run_behind_a_link_is_found) {
  commit({.sequence = 1});
  std::filesystem::create_symlink(run_, directory_.path() + "/link");
  auto contents = read_run(*io_, directory_.path() + "/link");
  ASSERT_OK(contents);
  EXPECT_EQ(contents->checkpoints.size(), 1u);
}

TEST_P(Scan, a_committed_checkpoint_is_found_whole) {
  const TestCommit wanted{.sequence = 12, .step = 1200, .metrics = {{"loss", 0.5}}};
  const Checkpoint written = commit(wanted);
  const RunContents contents = scan();
  ASSERT_EQ(contents.checkpoints.size(), 1u);
  EXPECT_EQ(contents.run_id, kTestRunId);
  EXPECT_EQ(contents.checkpoints[0].path, run_ + "/00000012-step-1200");
  EXPECT_EQ(contents.checkpoints[0].manifest.parts, written.manifest.parts);
  EXPECT_EQ(contents.checkpoints[0].bytes(),
            part_bytes_for_test(wanted, 0).size() + part_bytes_for_test(wanted, 1).size());
  EXPECT_TRUE(contents.damaged.empty());
  EXPECT_EQ(contents.next_sequence, 13u);
}

// M13, DUR-12: each of mtime, name and step would choose another one.
TEST_P(Scan, latest_is_the_highest_sequence_whatever_time_name_and_step_say) {
  const Checkpoint low = commit({.sequence = 99'999'999, .step = 5000});
  const Checkpoint high = commit({.sequence = 100'000'000, .step = 3});
  std::filesystem::last_write_time(
      low.path, std::filesystem::file_time_type::clock::now() + std::chrono::hours(48));
  std::filesystem::last_write_time(
      low.path + "/manifest.json",
      std::filesystem::file_time_type::clock::now() + std::chrono::hours(48));
  ASSERT_LT(high.path, low.path);  // By name the newest comes first.
  const RunContents contents = scan();
  ASSERT_NE(contents.newest(), nullptr);
  EXPECT_EQ(contents.newest()->manifest.sequence, 100'000'000u);
  auto latest = select(contents, {.kind = Kind::kLatest});
  ASSERT_OK(latest);
  EXPECT_EQ((*latest)->path, high.path);
}

TEST_P(Scan, the_links_are_never_read) {
  commit({.sequence = 1, .step = 1});
  const Checkpoint newest = commit({.sequence = 2, .step = 2});
  std::filesystem::create_symlink("00000001-step-1", run_ + "/latest");
  const RunContents contents = scan();
  auto latest = select(contents, {.kind = Kind::kLatest});
  ASSERT_OK(latest);
  EXPECT_EQ((*latest)->path, newest.path);
}

TEST_P(Scan, a_damaged_manifest_is_listed_and_not_counted) {
  commit({.sequence = 1, .step = 10});
  const Checkpoint broken = commit({.sequence = 2, .step = 20});
  std::string text = read_file(broken.path + "/manifest.json");
  text[text.size() / 2] = static_cast<char>(text[text.size() / 2] ^ 1);
  write_file(broken.path + "/manifest.json", text);

  const RunContents contents = scan();
  EXPECT_EQ(contents.checkpoints.size(), 1u);
  ASSERT_EQ(contents.damaged.size(), 1u);
  EXPECT_EQ(contents.damaged[0].path, broken.path);
  EXPECT_EQ(contents.damaged[0].name.sequence, 2u);
  EXPECT_EQ(contents.next_sequence, 3u);
  auto by_sequence = select(contents, {.kind = Kind::kSequence, .sequence = 2});
  ASSERT_FALSE(by_sequence);
  EXPECT_EQ(by_sequence.error().code(), Code::kDataLoss);
  auto latest = select(contents, {.kind = Kind::kLatest});
  ASSERT_OK(latest);
  EXPECT_EQ((*latest)->manifest.sequence, 1u);
}

TEST_P(Scan, latest_is_data_loss_when_every_checkpoint_is_damaged) {
  const Checkpoint broken = commit({.sequence = 1});
  std::filesystem::remove(broken.path + "/manifest.json");
  const RunContents contents = scan();
  EXPECT_EQ(contents.newest(), nullptr);
  auto latest = select(contents, {.kind = Kind::kLatest});
  ASSERT_FALSE(latest);
  EXPECT_EQ(latest.error().code(), Code::kDataLoss);
}

// Every prefix of a directory's files (DUR-14).
TEST_P(Scan, without_its_manifest_a_directory_is_no_checkpoint) {
  const Checkpoint whole = commit({.sequence = 1});
  std::filesystem::remove(whole.path + "/manifest.json");
  for (const char* file : {"state.json", "manifest.sums", "part1.safetensors"}) {
    const RunContents contents = scan();
    EXPECT_TRUE(contents.checkpoints.empty());
    EXPECT_EQ(contents.damaged.size(), 1u) << "before removing " << file;
    std::filesystem::remove(whole.path + "/" + file);
  }
}

// RES-2.
TEST_P(Scan, a_checkpoint_of_another_run_is_refused) {
  const std::string other = directory_.path() + "/other";
  const std::string other_id = "ffffffffffffffffffffffffffffffff";
  ASSERT_OK(create_run(*io_, other, other_id));
  auto foreign = commit_for_test(*io_, other, {.sequence = 7, .run_id = other_id});
  ASSERT_OK(foreign);
  commit({.sequence = 3});
  std::filesystem::rename(foreign->path, run_ + "/00000007-step-0");

  const RunContents contents = scan();
  ASSERT_EQ(contents.checkpoints.size(), 1u);
  EXPECT_EQ(contents.newest()->manifest.sequence, 3u);
  ASSERT_EQ(contents.damaged.size(), 1u);
  EXPECT_NE(contents.damaged[0].reason.message().find(other_id), std::string_view::npos);
  EXPECT_NE(contents.damaged[0].reason.message().find(kTestRunId), std::string_view::npos);
  EXPECT_EQ(contents.next_sequence, 8u);
}

TEST_P(Scan, a_renamed_checkpoint_is_refused) {
  const Checkpoint one = commit({.sequence = 1, .step = 5});
  std::filesystem::rename(one.path, run_ + "/00000009-step-5");
  const RunContents contents = scan();
  EXPECT_TRUE(contents.checkpoints.empty());
  ASSERT_EQ(contents.damaged.size(), 1u);
  EXPECT_NE(contents.damaged[0].reason.message().find("00000001-step-5"), std::string_view::npos);
}

// SEC-10.
TEST_P(Scan, a_link_a_file_and_a_fifo_with_a_checkpoints_name_are_damaged_and_not_followed) {
  const Checkpoint one = commit({.sequence = 1, .step = 5});
  std::filesystem::rename(one.path, directory_.path() + "/elsewhere");
  std::filesystem::create_symlink(directory_.path() + "/elsewhere", one.path);
  write_file(run_ + "/00000002-step-5", "");
  ASSERT_EQ(::mkfifo((run_ + "/00000003-step-5").c_str(), 0600), 0);
  std::filesystem::create_directory(run_ + "/00000004-step-5");
  ASSERT_EQ(::mkfifo((run_ + "/00000004-step-5/manifest.json").c_str(), 0600), 0);
  const RunContents contents = scan();
  EXPECT_TRUE(contents.checkpoints.empty());
  EXPECT_EQ(contents.damaged.size(), 4u);
}

TEST_P(Scan, another_users_directory_is_damaged) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root to give a directory away";
  const Checkpoint one = commit({.sequence = 1});
  ASSERT_EQ(::chown(one.path.c_str(), 12345, 12345), 0);
  const RunContents contents = scan();
  EXPECT_TRUE(contents.checkpoints.empty());
  ASSERT_EQ(contents.damaged.size(), 1u);
  EXPECT_NE(contents.damaged[0].reason.message().find("12345"), std::string_view::npos);
}

TEST_P(Scan, names_that_are_nearly_ours_are_ignored) {
  for (const char* name : {"12-step-5", "00000001-step-", "00000001-step-05", "x00000001-step-5",
                           "00000001-step-5.bak", "00000001"}) {
    std::filesystem::create_directory(run_ + "/" + name);
  }
  const RunContents contents = scan();
  EXPECT_TRUE(contents.damaged.empty());
  EXPECT_EQ(contents.next_sequence, 1u);
}

TEST_P(Scan, a_planted_name_does_not_use_the_sequences_up) {
  std::filesystem::create_directories(run_ + "/18446744073709551615-step-0/x");
  const RunContents contents = scan();
  EXPECT_EQ(contents.damaged.size(), 1u);
  EXPECT_EQ(contents.next_sequence, 1u);
}

TEST_P(Scan, the_next_sequence_is_above_temporary_directories_too) {
  commit({.sequence = 3});
  std::filesystem::create_directory(run_ + "/.stillframe/tmp-00000009-0123456789abcdef");
  EXPECT_EQ(scan().next_sequence, 10u);
}

TEST_P(Scan, copied_checkpoints_without_a_run_id_can_be_read) {
  const Checkpoint one = commit({.sequence = 1});
  std::filesystem::create_directory(directory_.path() + "/copy");
  std::filesystem::copy(one.path, directory_.path() + "/copy/00000001-step-0");
  auto contents = read_run(*io_, directory_.path() + "/copy");
  ASSERT_OK(contents);
  EXPECT_EQ(contents->run_id, kTestRunId);
  EXPECT_EQ(contents->checkpoints.size(), 1u);
}

TEST_P(Scan, not_found_says_what_there_is) {
  commit({.sequence = 4, .step = 40});
  commit({.sequence = 6, .step = 60});
  const RunContents contents = scan();
  auto missing = select(contents, {.kind = Kind::kStep, .step = 50});
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code(), Code::kNotFound);
  const std::string message(missing.error().message());
  for (const char* part : {"step-50", "2", "40", "60"}) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
}

TEST_P(Scan, a_step_names_its_newest_checkpoint) {
  commit({.sequence = 1, .step = 5});
  commit({.sequence = 2, .step = 6});
  commit({.sequence = 3, .step = 5});
  const RunContents contents = scan();
  auto found = select(contents, {.kind = Kind::kStep, .step = 5});
  ASSERT_OK(found);
  EXPECT_EQ((*found)->manifest.sequence, 3u);
}

class CreateRun : public CatalogTest {};
CATALOG_TEST_SUITE(CreateRun);

TEST_P(CreateRun, makes_parents_and_keeps_its_first_id) {
  const std::string path = directory_.path() + "/a/b/c";
  auto first = create_run(*io_, path, kTestRunId);
  ASSERT_OK(first);
  EXPECT_EQ(*first, kTestRunId);
  auto second = create_run(*io_, path, "ffffffffffffffffffffffffffffffff");
  ASSERT_OK(second);
  EXPECT_EQ(*second, kTestRunId);
  struct stat status = {};
  ASSERT_EQ(::stat((path + "/.stillframe/spool").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777u, 0700u);
}

TEST_P(CreateRun, refuses_a_directory_with_other_peoples_files) {
  const std::string path = directory_.path() + "/home";
  std::filesystem::create_directory(path);
  write_file(path + "/thesis.tex", "x");
  auto created = create_run(*io_, path, kTestRunId);
  ASSERT_FALSE(created);
  EXPECT_EQ(created.error().code(), Code::kInvalidArgument);
  EXPECT_FALSE(exists(path + "/.stillframe"));
}

TEST_P(CreateRun, does_not_disown_checkpoints_whose_run_id_is_gone) {
  commit({.sequence = 1});
  std::filesystem::remove(run_ + "/.stillframe/run-id");
  auto created = create_run(*io_, run_, "ffffffffffffffffffffffffffffffff");
  ASSERT_FALSE(created);
  EXPECT_EQ(created.error().code(), Code::kDataLoss);
  EXPECT_EQ(scan().checkpoints.size(), 1u);
}

TEST_P(CreateRun, stops_a_writer_where_the_sequence_floor_is_damaged) {
  write_file(run_ + "/.stillframe/sequence", "12");
  auto created = create_run(*io_, run_, kTestRunId);
  ASSERT_FALSE(created);
  EXPECT_EQ(created.error().code(), Code::kDataLoss);
  EXPECT_OK(read_run(*io_, run_));
}

// Pure: no directory.
RunContents contents_with(const std::vector<double>& values, format::BestMode mode) {
  RunContents contents;
  contents.run_id = kTestRunId;
  for (std::size_t i = 0; i < values.size(); ++i) {
    Checkpoint one;
    one.path = concat("run/", i);
    one.manifest.sequence = i + 1;
    one.manifest.metrics["score"] = values[i];
    one.manifest.best_rules = {{.metric = "score", .mode = mode}};
    contents.checkpoints.push_back(one);
  }
  return contents;
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(Best, not_a_number_never_wins) {
  for (const auto mode : {format::BestMode::kMin, format::BestMode::kMax}) {
    const RunContents contents = contents_with({kNan, 2, kNan}, mode);
    ASSERT_NE(contents.best(), nullptr);
    EXPECT_EQ(contents.best()->manifest.sequence, 2u);
    EXPECT_EQ(contents_with({kNan, kNan}, mode).best(), nullptr);
  }
}

TEST(Best, a_tie_goes_to_the_newest) {
  for (const auto mode : {format::BestMode::kMin, format::BestMode::kMax}) {
    EXPECT_EQ(contents_with({3, 3, 3}, mode).best()->manifest.sequence, 3u);
  }
}

TEST(Best, follows_the_mode_and_takes_infinities_for_numbers) {
  EXPECT_EQ(contents_with({2, 1, 3}, format::BestMode::kMin).best()->manifest.sequence, 2u);
  EXPECT_EQ(contents_with({2, 1, 3}, format::BestMode::kMax).best()->manifest.sequence, 3u);
  EXPECT_EQ(contents_with({2, kInfinity}, format::BestMode::kMax).best()->manifest.sequence, 2u);
  EXPECT_EQ(contents_with({2, -kInfinity, 3}, format::BestMode::kMin).best()->manifest.sequence,
            2u);
}

TEST(Best, needs_a_rule_and_a_metric_of_that_name) {
  RunContents contents = contents_with({1, 2}, format::BestMode::kMax);
  const format::BestRule other{.metric = "accuracy", .mode = format::BestMode::kMax};
  EXPECT_EQ(contents.best(&other), nullptr);
  contents.checkpoints.back().manifest.best_rules.clear();
  EXPECT_EQ(contents.best(), nullptr);
  auto selected = select(contents, {.kind = format::Selector::Kind::kBest});
  ASSERT_FALSE(selected);
  EXPECT_EQ(selected.error().code(), Code::kNotFound);
}

std::vector<std::uint64_t> victims_of(const RunContents& contents, const RetentionPolicy& policy) {
  std::vector<std::uint64_t> sequences;
  for (const Checkpoint* victim : choose_victims(contents, policy)) {
    sequences.push_back(victim->manifest.sequence);
  }
  return sequences;
}

using Sequences = std::vector<std::uint64_t>;

TEST(Retention, keeps_all_without_a_limit) {
  EXPECT_EQ(victims_of(contents_with({1, 2, 3}, format::BestMode::kMax), {}), Sequences());
}

TEST(Retention, removes_all_but_the_newest_oldest_first) {
  const RunContents contents = contents_with({1, 2, 3, 4}, format::BestMode::kMax);
  EXPECT_EQ(victims_of(contents, {.keep_last = 2}), Sequences({1, 2}));
  EXPECT_EQ(victims_of(contents, {.keep_last = 4}), Sequences());
  EXPECT_EQ(victims_of(contents, {.keep_last = 9}), Sequences());
}

BestKeep best_keep(format::BestMode mode, std::uint32_t count) {
  return {.rule = {.metric = "score", .mode = mode}, .count = count};
}

TEST(Retention, spares_the_best) {
  const RunContents contents = contents_with({9, 1, 9, kNan, 0}, format::BestMode::kMax);
  const auto victims = [&](format::BestMode mode, std::uint32_t count) {
    return victims_of(contents, {.keep_last = 1, .best = {best_keep(mode, count)}});
  };
  EXPECT_EQ(victims(format::BestMode::kMax, 0), Sequences({1, 2, 3, 4}));
  EXPECT_EQ(victims(format::BestMode::kMax, 1), Sequences({1, 2, 4}));
  EXPECT_EQ(victims(format::BestMode::kMax, 2), Sequences({2, 4}));
  EXPECT_EQ(victims(format::BestMode::kMax, 9), Sequences({4}));
  EXPECT_EQ(victims(format::BestMode::kMin, 2), Sequences({1, 3, 4}));
}

TEST(Retention, spares_the_best_of_every_criterion) {
  RunContents contents = contents_with({9, 1, 5, 4, 6}, format::BestMode::kMax);
  contents.checkpoints[2].manifest.metrics["loss"] = 0.5;
  contents.checkpoints[3].manifest.metrics["loss"] = 0.25;
  const BestKeep loss{.rule = {.metric = "loss", .mode = format::BestMode::kMin}, .count = 1};
  EXPECT_EQ(
      victims_of(contents, {.keep_last = 1, .best = {best_keep(format::BestMode::kMax, 1), loss}}),
      Sequences({2, 3}));
}

TEST(Retention, spares_every_nth_step) {
  RunContents contents = contents_with({1, 2, 3, 4, 5}, format::BestMode::kMax);
  for (std::size_t i = 0; i < 5; ++i) {
    contents.checkpoints[i].manifest.step = static_cast<std::int64_t>(50 * i);
  }
  EXPECT_EQ(victims_of(contents, {.keep_last = 1, .keep_every = 100}), Sequences({2, 4}));
  EXPECT_EQ(victims_of(contents, {.keep_last = 0, .keep_every = 100}), Sequences());
}

TEST(Retention, spares_what_is_tagged) {
  RunContents contents = contents_with({1, 2, 3, 4}, format::BestMode::kMax);
  contents.checkpoints[1].tags = {"paper"};
  EXPECT_EQ(victims_of(contents, {.keep_last = 1}), Sequences({1, 3}));
}

TEST(Retention, never_chooses_the_last_one) {
  const RunContents contents = contents_with({kNan}, format::BestMode::kMax);
  EXPECT_EQ(victims_of(contents, {.keep_last = 1, .best = {best_keep(format::BestMode::kMax, 1)}}),
            Sequences());
  EXPECT_EQ(victims_of(RunContents(), {.keep_last = 1}), Sequences());
}

TEST(Retention, removes_nothing_while_a_tag_cannot_be_read) {
  RunContents contents = contents_with({1, 2, 3}, format::BestMode::kMax);
  contents.damaged_tags = {"paper"};
  EXPECT_EQ(victims_of(contents, {.keep_last = 1}), Sequences());
}

}  // namespace
}  // namespace stillframe::catalog
