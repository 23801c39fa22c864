// What a person or a script sees of `stillframe`: its words, its JSON, its exit codes, on real
// runs.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <thread>

#include "base/text.h"
#include "catalog/change.h"
#include "catalog/run_lock.h"
#include "shm/channel.h"
#include "tests/catalog/commit_for_test.h"
#include "tests/cli/command.h"

namespace stillframe::cli {
namespace {

namespace fs = std::filesystem;
namespace json = boost::json;

class Cli : public testing::Test {
 protected:
  Cli() {
    root_ = testing::TempDir() + "stillframe-cli-XXXXXX";
    check(::mkdtemp(root_.data()) != nullptr, "a test can make a directory");
    run_ = root_ + "/digits";
    auto created = uring::create_backend({});
    check(created.has_value(), "a test can use the disk");
    io_ = std::move(created->backend);
    check(catalog::create_run(*io_, run_, catalog::kTestRunId).has_value(), "a run is made");
  }
  ~Cli() override {
    std::error_code ignored;
    fs::remove_all(root_, ignored);
  }

  std::string commit(std::uint64_t sequence, std::int64_t step,
                     const std::map<std::string, double>& metrics = {},
                     const std::vector<format::BestRule>& best_rules = {
                         {.metric = "loss", .mode = format::BestMode::kMin}}) {
    catalog::TestCommit commit{.sequence = sequence, .step = step};
    commit.metrics = metrics;
    commit.best_rules = best_rules;
    auto checkpoint = catalog::commit_for_test(*io_, run_, commit);
    check(checkpoint.has_value(), "a checkpoint is committed");
    return checkpoint->path;
  }

  // Where, below the run, and how many bytes are changed.
  static void flip_byte(const std::string& path, std::int64_t offset) {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(offset);
    const int byte = file.get();
    file.seekp(offset);
    file.put(static_cast<char>(byte ^ 1));
    check(file.good(), "a byte is flipped");
  }

  std::set<std::uint64_t> sequences() {
    std::set<std::uint64_t> found;
    auto contents = catalog::read_run(*io_, run_);
    if (!contents) return found;
    for (const auto& one : contents->checkpoints) found.insert(one.manifest.sequence);
    return found;
  }

  std::vector<std::string> tags_of(std::uint64_t sequence) {
    auto contents = catalog::read_run(*io_, run_);
    if (!contents) return {"unreadable"};
    for (const auto& one : contents->checkpoints) {
      if (one.manifest.sequence == sequence) return one.tags;
    }
    return {"absent"};
  }

  std::string at(const std::string& selector) const { return run_ + "@" + selector; }

  std::string root_;
  std::string run_;
  std::unique_ptr<uring::IoBackend> io_;
};

using Tags = std::vector<std::string>;

TEST_F(Cli, ls_lists_oldest_first_and_marks_the_newest_and_the_best) {
  commit(1, 100, {{"loss", 0.25}});
  commit(2, 200, {{"loss", 0.5}});
  const Outcome outcome = stillframe({"ls", run_});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(outcome.err, "");
  EXPECT_LT(outcome.out.find("loss=0.25"), outcome.out.find("loss=0.5"));
  EXPECT_NE(outcome.out.find("loss=0.25  best\n"), std::string::npos) << outcome.out;
  EXPECT_NE(outcome.out.find("\n*         2   200"), std::string::npos) << outcome.out;
  EXPECT_NE(outcome.out.find("loss=0.5   latest\n"), std::string::npos) << outcome.out;
}

TEST_F(Cli, ls_as_json_has_every_checkpoint_with_numbers_as_numbers) {
  const std::string path = commit(1, 100, {{"loss", std::numeric_limits<double>::quiet_NaN()}});
  commit(2, 100, {{"loss", 0.5}});
  const json::value document = stillframe({"--json", "ls", run_}).json();
  ASSERT_TRUE(document.is_object());
  const json::array& list = document.at("checkpoints").as_array();
  ASSERT_EQ(list.size(), 2U);
  EXPECT_EQ(list[0].at("sequence").as_int64(), 1);
  EXPECT_EQ(list[0].at("step").as_int64(), 100);
  EXPECT_EQ(list[0].at("path").as_string(), path);
  EXPECT_EQ(list[0].at("metrics").at("loss").as_string(), "NaN");
  EXPECT_FALSE(list[0].at("newest").as_bool());
  EXPECT_TRUE(list[1].at("newest").as_bool());
  EXPECT_TRUE(list[1].at("best").as_bool());
  EXPECT_TRUE(list[1].at("damage").is_null());
}

TEST_F(Cli, ls_of_a_run_without_checkpoints_is_no_error) {
  const Outcome outcome = stillframe({"ls", run_});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_NE(outcome.out.find("no checkpoint yet"), std::string::npos) << outcome.out;
  EXPECT_EQ(stillframe({"ls", run_, "--json"}).json().at("checkpoints").as_array().size(), 0U);
}

TEST_F(Cli, ls_lists_a_damaged_checkpoint_with_the_reason) {
  commit(1, 100);
  const std::string damaged = commit(2, 200);
  flip_byte(damaged + "/manifest.json", 40);
  const Outcome outcome = stillframe({"ls", run_});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_NE(outcome.out.find("DAMAGED " + damaged), std::string::npos) << outcome.out;
  const json::value document = stillframe({"ls", run_, "--json"}).json();
  EXPECT_TRUE(document.at("checkpoints").at(0).at("newest").as_bool());
  EXPECT_TRUE(document.at("checkpoints").at(1).at("damage").is_string());
}

TEST_F(Cli, show_names_tensors_dtypes_shapes_parts_and_hashes) {
  commit(7, 100, {{"loss", 0.25}});
  const Outcome outcome = stillframe({"show", run_});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  for (const char* wanted : {"sequence  7", "step      100", "part0.safetensors",
                             "part1.safetensors", "root ", "state.json", "loss=0.25"}) {
    EXPECT_NE(outcome.out.find(wanted), std::string::npos) << wanted << " in\n" << outcome.out;
  }
  const json::value document = stillframe({"show", at("latest"), "--json"}).json();
  ASSERT_TRUE(document.is_object());
  const json::value& part = document.at("parts").at(1);
  EXPECT_EQ(part.at("file").as_string(), "part1.safetensors");
  EXPECT_EQ(part.at("root").as_string().size(), 32U);
  ASSERT_EQ(part.at("tensors").as_array().size(), 1U);
  EXPECT_EQ(part.at("tensors").at(0).at("bytes").as_int64(), 70000);
  EXPECT_FALSE(part.at("tensors").at(0).at("dtype").as_string().empty());
  EXPECT_TRUE(document.at("newest").as_bool());
}

TEST_F(Cli, every_selector_names_its_checkpoint) {
  const std::string first = commit(1, 100, {{"loss", 0.25}});
  commit(2, 200, {{"loss", 0.5}});
  ASSERT_EQ(stillframe({"tag", at("2"), "good"}).exit_code, 0);
  const auto shown = [&](const std::string& address) {
    const json::value document = stillframe({"show", address, "--json"}).json();
    return document.is_object() ? document.at("sequence").as_int64() : -1;
  };
  EXPECT_EQ(shown(run_), 2);
  EXPECT_EQ(shown(run_ + "/"), 2);
  EXPECT_EQ(shown(at("latest")), 2);
  EXPECT_EQ(shown(at("best")), 1);
  EXPECT_EQ(shown(at("1")), 1);
  EXPECT_EQ(shown(at("00000001")), 1);
  EXPECT_EQ(shown(at("step-100")), 1);
  EXPECT_EQ(shown(at("good")), 2);
  EXPECT_EQ(shown(first), 1);
  EXPECT_EQ(shown(run_ + "/best"), 1);
}

TEST_F(Cli, a_run_may_be_called_as_a_selector_is) {
  commit(1, 100);
  for (const char* name : {"best", "latest", "user@host"}) {
    const std::string other = root_ + "/" + name;
    fs::rename(run_, other);
    EXPECT_EQ(stillframe({"ls", other}).exit_code, 0) << other;
    EXPECT_EQ(stillframe({"show", other}).exit_code, 0) << other;
    EXPECT_EQ(stillframe({"show", other + "@latest"}).exit_code, 0) << other;
    EXPECT_EQ(stillframe({"tag", other + "@1", "good"}).exit_code, 0) << other;
    fs::rename(other, run_);
  }
}

TEST_F(Cli, best_ranks_by_a_metric_and_names_what_there_is) {
  commit(1, 100, {{"loss", 0.25}, {"score", 3}});
  commit(2, 200, {{"loss", 0.5}, {"score", 9}});
  commit(3, 300, {{"loss", 0.25}});
  const auto ranked = [&](std::vector<std::string> words) {
    words.insert(words.begin(), {"best", run_, "--json"});
    std::vector<std::int64_t> sequences;
    const json::value document = stillframe(words).json();
    for (const json::value& one : document.at("checkpoints").as_array()) {
      sequences.push_back(one.at("sequence").as_int64());
    }
    return sequences;
  };
  using Sequences = std::vector<std::int64_t>;
  EXPECT_EQ(ranked({}), Sequences({3}));  // The run's own criterion; of equals the newest.
  EXPECT_EQ(ranked({"-k", "9"}), Sequences({3, 1, 2}));
  EXPECT_EQ(ranked({"--mode", "max"}), Sequences({2}));
  EXPECT_EQ(ranked({"--metric", "score", "--mode", "max", "-k", "2"}), Sequences({2, 1}));

  const Outcome unknown = stillframe({"best", run_, "--metric", "f1", "--mode", "max"});
  EXPECT_EQ(unknown.exit_code, 3);
  EXPECT_TRUE(unknown.err.find("its metrics are loss, score") != std::string::npos) << unknown.err;
  const Outcome unsaid = stillframe({"best", run_, "--metric", "score"});
  EXPECT_NE(unsaid.exit_code, 0);
  EXPECT_TRUE(unsaid.err.find("--mode min or max") != std::string::npos) << unsaid.err;
  EXPECT_EQ(stillframe({"best", run_, "--mode", "least"}).exit_code, 2);
}

TEST_F(Cli, best_of_a_metric_is_a_selector_where_the_run_has_that_criterion) {
  commit(1, 100, {{"loss", 0.25}, {"score", 3}});
  commit(2, 200, {{"loss", 0.5}, {"score", 9}},
         {{.metric = "loss", .mode = format::BestMode::kMin},
          {.metric = "score", .mode = format::BestMode::kMax}});
  const auto shown = [&](const std::string& selector) {
    return stillframe({"show", run_ + "@" + selector, "--json"}).json().at("sequence").as_int64();
  };
  EXPECT_EQ(shown("best"), 1);
  EXPECT_EQ(shown("best:loss"), 1);
  EXPECT_EQ(shown("best:score"), 2);
  const Outcome other = stillframe({"show", run_ + "@best:f1"});
  EXPECT_EQ(other.exit_code, 3);
  EXPECT_NE(other.err.find("it has loss, score"), std::string::npos) << other.err;
  // Then its mode need not be said either.
  const json::value document = stillframe({"best", run_, "--metric", "score", "--json"}).json();
  EXPECT_EQ(document.at("mode").as_string(), "max");
}

TEST_F(Cli, a_version_is_a_tag_and_a_name_of_another_meaning_is_none) {
  commit(1, 100);
  commit(2, 200);
  ASSERT_EQ(stillframe({"tag", at("1"), "v1.0"}).exit_code, 0);
  EXPECT_EQ(stillframe({"show", at("v1.0"), "--json"}).json().at("sequence").as_int64(), 1);
  for (const char* name : {"latest", "best", "12", "step-7", "../x", ""}) {
    EXPECT_EQ(stillframe({"tag", at("1"), name}).exit_code, 2) << name;
  }
}

TEST_F(Cli, verify_of_an_intact_run_reads_all_and_ends_with_0) {
  commit(1, 100);
  commit(2, 200);
  const Outcome outcome = stillframe({"verify", run_});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(outcome.err, "");
  const json::value document = stillframe({"verify", run_, "--json"}).json();
  EXPECT_TRUE(document.at("ok").as_bool());
  EXPECT_EQ(document.at("checkpoints").as_array().size(), 2U);
}

TEST_F(Cli, verify_names_file_extent_and_offset_of_a_flipped_bit_and_ends_with_4) {
  commit(1, 100);
  const std::string damaged = commit(2, 200);
  flip_byte(damaged + "/part1.safetensors", 50000);
  const Outcome outcome = stillframe({"verify", run_});
  EXPECT_EQ(outcome.exit_code, 4);
  EXPECT_TRUE(outcome.has_one_error_line()) << outcome.err;
  EXPECT_NE(outcome.out.find("part1.safetensors extent 0 (offset 0"), std::string::npos)
      << outcome.out;
  const Outcome as_json = stillframe({"verify", run_, "--json"});
  EXPECT_EQ(as_json.exit_code, 4);
  EXPECT_FALSE(as_json.json().at("ok").as_bool());
  EXPECT_TRUE(as_json.json().at("checkpoints").at(0).at("ok").as_bool());
  EXPECT_EQ(as_json.json().at("checkpoints").at(1).at("damage").as_array().size(), 1U);
}

TEST_F(Cli, verify_of_one_checkpoint_does_not_judge_the_others) {
  const std::string damaged = commit(1, 100);
  commit(2, 200);
  flip_byte(damaged + "/part0.safetensors", 4100);
  EXPECT_EQ(stillframe({"verify", at("2")}).exit_code, 0);
  EXPECT_EQ(stillframe({"verify", at("1")}).exit_code, 4);
}

TEST_F(Cli, verify_counts_a_truncated_part_a_lost_manifest_and_a_changed_state_as_damage) {
  const std::string truncated = commit(1, 100);
  const std::string lost = commit(2, 200);
  const std::string changed = commit(3, 300);
  fs::resize_file(truncated + "/part0.safetensors", 4096);
  fs::remove(lost + "/manifest.json");
  flip_byte(changed + "/state.json", 1);
  const Outcome outcome = stillframe({"verify", run_, "--json"});
  EXPECT_EQ(outcome.exit_code, 4);
  ASSERT_TRUE(outcome.json().is_object()) << outcome.out;
  const json::value document = outcome.json();
  EXPECT_EQ(document.at("checkpoints").as_array().size(), 3U);
  for (const json::value& one : document.at("checkpoints").as_array()) {
    EXPECT_FALSE(one.at("ok").as_bool()) << one;
  }
}

TEST_F(Cli, restore_copies_out_what_opens_again_and_refuses_an_existing_target) {
  const std::string source = commit(3, 300);
  const std::string target = root_ + "/out";
  const Outcome outcome = stillframe({"restore", at("3"), target});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  for (const char* name : {"part0.safetensors", "part1.safetensors", "state.json"}) {
    std::ifstream a(source + "/" + name, std::ios::binary);
    std::ifstream b(target + "/" + name, std::ios::binary);
    const std::string one{std::istreambuf_iterator<char>(a), {}};
    const std::string two{std::istreambuf_iterator<char>(b), {}};
    EXPECT_FALSE(one.empty()) << name;
    EXPECT_TRUE(one == two) << name;
  }
  const Outcome again = stillframe({"restore", at("3"), target});
  EXPECT_EQ(again.exit_code, 1);
  EXPECT_TRUE(again.has_one_error_line()) << again.err;
}

TEST_F(Cli, restore_of_a_damaged_checkpoint_leaves_nothing_and_ends_with_4) {
  flip_byte(commit(3, 300) + "/part1.safetensors", 60000);
  const Outcome outcome = stillframe({"restore", at("3"), root_ + "/out"});
  EXPECT_EQ(outcome.exit_code, 4);
  EXPECT_TRUE(outcome.has_one_error_line()) << outcome.err;
  EXPECT_FALSE(fs::exists(root_ + "/out"));
}

TEST_F(Cli, rm_removes_one_and_gives_its_space_back) {
  commit(1, 100);
  commit(2, 200);
  const Outcome outcome = stillframe({"rm", at("1")});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(sequences(), (std::set<std::uint64_t>{2}));
  EXPECT_TRUE(fs::is_empty(run_ + "/.stillframe/spool"));
}

TEST_F(Cli, rm_refuses_the_last_restorable_one_without_force) {
  const std::string broken = commit(1, 100);
  commit(2, 200);
  fs::resize_file(broken + "/part0.safetensors", 4096);  // Listed, but it does not restore.
  const Outcome outcome = stillframe({"rm", at("2")});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_TRUE(outcome.has_one_error_line()) << outcome.err;
  EXPECT_NE(outcome.err.find("--force"), std::string::npos) << outcome.err;
  EXPECT_EQ(sequences(), (std::set<std::uint64_t>{1, 2}));
  EXPECT_EQ(stillframe({"rm", at("2"), "--force"}).exit_code, 0);
  EXPECT_EQ(sequences(), (std::set<std::uint64_t>{1}));
}

TEST_F(Cli, rm_refuses_names_that_move_and_says_the_one_that_stays) {
  commit(1, 100);
  commit(2, 100);
  for (const char* selector : {"latest", "step-100"}) {
    const Outcome outcome = stillframe({"rm", at(selector)});
    EXPECT_EQ(outcome.exit_code, 1) << selector;
    EXPECT_NE(outcome.err.find(at("2")), std::string::npos) << outcome.err;
  }
  EXPECT_EQ(stillframe({"rm", run_}).exit_code, 2);
  EXPECT_EQ(sequences().size(), 2U);
}

TEST_F(Cli, rm_removes_a_damaged_checkpoint_and_refuses_a_protected_one) {
  const std::string damaged = commit(1, 100);
  commit(2, 200);
  commit(3, 300);
  fs::remove(damaged + "/manifest.json");
  EXPECT_EQ(stillframe({"rm", at("1")}).exit_code, 0);
  EXPECT_FALSE(fs::exists(damaged));

  ASSERT_EQ(stillframe({"pin", at("2")}).exit_code, 0);
  EXPECT_EQ(stillframe({"rm", at("2")}).exit_code, 1);
  EXPECT_EQ(sequences(), (std::set<std::uint64_t>{2, 3}));
  EXPECT_EQ(stillframe({"rm", at("2"), "--force"}).exit_code, 0);
  EXPECT_EQ(sequences(), (std::set<std::uint64_t>{3}));
  EXPECT_TRUE(fs::is_empty(run_ + "/.stillframe/tags"));
}

TEST_F(Cli, pin_and_unpin_set_and_take_a_tag) {
  commit(1, 100);
  commit(2, 200);
  EXPECT_EQ(stillframe({"pin", at("1")}).exit_code, 0);
  EXPECT_EQ(tags_of(1), Tags{"pin-1"});
  EXPECT_EQ(stillframe({"pin", at("1"), "--as", "paper"}).exit_code, 0);
  EXPECT_EQ(tags_of(1), (Tags{"paper", "pin-1"}));
  EXPECT_EQ(stillframe({"unpin", at("paper")}).exit_code, 0);
  EXPECT_EQ(stillframe({"unpin", at("1")}).exit_code, 0);
  EXPECT_EQ(tags_of(1), Tags{});
  const Outcome outcome = stillframe({"unpin", at("1")});
  EXPECT_EQ(outcome.exit_code, 3);
  EXPECT_TRUE(outcome.has_one_error_line()) << outcome.err;
}

TEST_F(Cli, tag_moves_a_name_that_exists_and_says_so) {
  commit(1, 100);
  commit(2, 200);
  EXPECT_EQ(stillframe({"tag", at("1"), "good"}).exit_code, 0);
  const Outcome moved = stillframe({"tag", at("2"), "good", "--json"});
  EXPECT_EQ(moved.exit_code, 0) << moved.err;
  ASSERT_TRUE(moved.json().is_object());
  EXPECT_EQ(moved.json().at("moved_from").as_int64(), 1);
  EXPECT_EQ(tags_of(1), Tags{});
  EXPECT_EQ(tags_of(2), Tags{"good"});
}

TEST_F(Cli, wrong_command_lines_end_with_2_and_one_line) {
  commit(1, 100);
  const std::vector<std::vector<std::string>> wrong = {
      {},
      {"nonsense"},
      {"ls"},
      {"ls", at("1")},
      {"ls", run_, "--no-such-flag"},
      {"show", at("")},
      {"show", at("a b")},
      {"tag", at("1"), "12"},
      {"tag", at("1"), "../../x"},
      {"pin", at("1"), "--as", "latest"},
      {"restore", at("1")},
      {"status", "extra"},
  };
  for (const auto& arguments : wrong) {
    const Outcome outcome = stillframe(arguments);
    const std::string shown = arguments.empty() ? "(nothing)" : arguments.back();
    EXPECT_EQ(outcome.exit_code, 2) << shown;
    EXPECT_TRUE(outcome.has_one_error_line()) << shown << ": " << outcome.err;
    EXPECT_EQ(outcome.out, "") << shown;
  }
}

TEST_F(Cli, what_is_not_there_ends_with_3_and_one_line) {
  commit(1, 100);
  const std::vector<std::vector<std::string>> absent = {{"ls", root_ + "/none"},
                                                        {"show", root_ + "/none@latest"},
                                                        {"show", at("12")},
                                                        {"show", at("step-7")},
                                                        {"show", at("no-tag")},
                                                        {"verify", at("12")},
                                                        {"rm", at("12")},
                                                        {"pin", at("12")},
                                                        {"restore", at("12"), root_ + "/o"}};
  for (const auto& arguments : absent) {
    const Outcome outcome = stillframe(arguments);
    EXPECT_EQ(outcome.exit_code, 3) << arguments[0] << ' ' << arguments[1];
    EXPECT_TRUE(outcome.has_one_error_line()) << outcome.err;
  }
  EXPECT_FALSE(fs::exists(root_ + "/none"));
}

TEST_F(Cli, an_error_is_one_line_even_for_a_path_with_a_newline) {
  const Outcome outcome = stillframe({"ls", root_ + "/a\nb\x1b[31m"});
  EXPECT_EQ(outcome.exit_code, 3);
  EXPECT_TRUE(outcome.has_one_error_line()) << outcome.err;
  EXPECT_EQ(outcome.err.find('\x1b'), std::string::npos);
}

TEST_F(Cli, help_and_version_end_with_0) {
  for (const char* flag : {"--help", "--version"}) {
    const Outcome outcome = stillframe({flag});
    EXPECT_EQ(outcome.exit_code, 0);
    EXPECT_NE(outcome.out, "");
    EXPECT_EQ(outcome.err, "");
  }
  for (const char* command :
       {"ls", "show", "verify", "restore", "rm", "pin", "unpin", "tag", "status", "doctor"}) {
    EXPECT_EQ(stillframe({command, "--help"}).exit_code, 0) << command;
  }
}

TEST_F(Cli, a_full_standard_output_is_a_failure) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full here";
  commit(1, 100);
  const std::string command = concat(STILLFRAME_CLI " ls ", run_, " > /dev/full 2> /dev/null");
  const int status = std::system(command.c_str());
  EXPECT_EQ(WEXITSTATUS(status), 1);
}

TEST_F(Cli, status_without_a_daemon_ends_with_3_and_starts_none) {
  const std::string socket = root_ + "/none.sock";
  const Outcome outcome = stillframe({"status", "--socket", socket});
  EXPECT_EQ(outcome.exit_code, 3);
  EXPECT_TRUE(outcome.has_one_error_line()) << outcome.err;
  EXPECT_NE(outcome.err.find(socket), std::string::npos) << outcome.err;
  EXPECT_FALSE(fs::exists(socket));
  EXPECT_EQ(stillframe({"status"}, {"STILLFRAME_SOCKET=" + socket}).exit_code, 3);
}

TEST_F(Cli, doctor_judges_the_machine_without_a_daemon) {
  const Outcome outcome = stillframe({"doctor", root_, "--json", "--socket", root_ + "/none.sock"});
  ASSERT_TRUE(outcome.json().is_object()) << outcome.out;
  const json::value document = outcome.json();
  EXPECT_EQ(document.at("ok").as_bool(), outcome.exit_code == 0);
  std::set<std::string> subjects;
  for (const json::value& finding : document.at("findings").as_array()) {
    subjects.emplace(finding.at("subject").as_string());
  }
  for (const char* wanted :
       {"io_uring", "memlock", "descriptors", "huge pages", "memory", "file system", "direct I/O",
        "daemon", "namespaces", "lane host", "lane pinned"}) {
    EXPECT_TRUE(subjects.contains(wanted)) << wanted;
  }
}

TEST_F(Cli, doctor_names_every_gpu_and_the_lane_of_its_tensors) {
  const std::vector<std::string> simulated = {"LD_LIBRARY_PATH=" STILLFRAME_SIMULATED_CUDA};
  const Outcome outcome = stillframe({"doctor", root_}, simulated);
  EXPECT_NE(outcome.out.find("GPU 0"), std::string::npos) << outcome.out;
  EXPECT_NE(outcome.out.find("Simulated GPU, 4.0 GiB, compute capability 9.0, "
                             "GPU-51515151-5151-5151-5151-515151515151; driver for CUDA 13.0"),
            std::string::npos)
      << outcome.out;
  EXPECT_NE(outcome.out.find("lanes hbm, ipc of GPU 1"), std::string::npos) << outcome.out;
  const Outcome none =
      stillframe({"doctor", root_, "--json"},
                 {"LD_LIBRARY_PATH=" STILLFRAME_SIMULATED_CUDA, "STILLFRAME_SIMULATED_GPUS=0"});
  const json::value document = none.json();
  bool is_said = false;
  for (const json::value& finding : document.at("findings").as_array()) {
    if (finding.at("subject").as_string() != "lane pinned") continue;
    is_said = finding.at("fact").as_string().find("CUDA_ERROR_NO_DEVICE") != std::string::npos;
  }
  EXPECT_TRUE(is_said) << none.out;
}

// A connection that opened the run as a trainer does, so that the daemon holds its lock.
shm::Channel attach(const std::string& socket, const std::string& run_path) {
  auto channel = shm::Channel::connect(socket);
  check(channel.has_value(), "the daemon listens");
  const auto ask = [&](shm::wire::MessageT message) {
    auto sent = channel->send(message);
    check(sent.has_value() && *sent, "the daemon reads");
    for (;;) {
      check(*channel->wait_readable(10'000), "the daemon answers");
      auto packet = channel->receive();
      check(packet.has_value(), "the daemon keeps the connection");
      if (!*packet || (*packet)->message.request != message.request) continue;
      return (*packet)->message.body.type;
    }
  };
  shm::wire::HelloT hello;
  hello.protocol_version = shm::kProtocolVersion;
  hello.role = "trainer";
  check(ask(shm::make_message(1, std::move(hello))) == shm::wire::Body::HelloReply, "greeted");
  shm::wire::AttachT request;
  request.run_path = run_path;
  request.world_size = 1;
  check(ask(shm::make_message(2, std::move(request))) == shm::wire::Body::AttachReply, "attached");
  return *std::move(channel);
}

TEST_F(Cli, rm_and_tag_ask_the_daemon_that_holds_the_run) {
  commit(1, 100);
  commit(2, 200);
  commit(3, 300);
  const std::string socket = root_ + "/d.sock";
  const DaemonProcess daemon(socket);
  ASSERT_TRUE(daemon.wait_listening());
  const shm::Channel trainer = attach(socket, run_);

  EXPECT_EQ(stillframe({"tag", at("2"), "good", "--socket", socket}).exit_code, 0);
  EXPECT_EQ(tags_of(2), Tags{"good"});
  const Outcome removed = stillframe({"rm", at("1")}, {"STILLFRAME_SOCKET=" + socket});
  EXPECT_EQ(removed.exit_code, 0) << removed.err;
  EXPECT_EQ(sequences(), (std::set<std::uint64_t>{2, 3}));

  // All that reads needs neither the lock nor the daemon.
  EXPECT_EQ(stillframe({"verify", run_, "--socket", root_ + "/none.sock"}).exit_code, 0);
  // And without that daemon's answer nothing is changed behind its back.
  const Outcome refused = stillframe({"rm", at("2"), "--force", "--socket", root_ + "/none.sock"});
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_TRUE(refused.has_one_error_line()) << refused.err;
  EXPECT_EQ(sequences(), (std::set<std::uint64_t>{2, 3}));
}

TEST_F(Cli, a_run_that_its_daemon_lets_go_of_a_moment_later_is_waited_for) {
  commit(1, 100);
  auto held = catalog::RunLock::acquire(run_, 7);
  ASSERT_TRUE(held.has_value()) << held.error().message();
  std::optional<catalog::RunLock> lock(*std::move(held));
  std::thread daemon([&lock] {
    std::this_thread::sleep_for(std::chrono::milliseconds(700));
    lock.reset();
  });
  const Outcome outcome = stillframe({"tag", at("1"), "good", "--socket", root_ + "/none.sock"});
  daemon.join();
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(tags_of(1), Tags{"good"});
}

TEST_F(Cli, status_names_the_clients_and_the_runs_of_the_daemon) {
  commit(1, 100);
  const std::string socket = root_ + "/d.sock";
  const DaemonProcess daemon(socket);
  ASSERT_TRUE(daemon.wait_listening());
  const shm::Channel trainer = attach(socket, run_);

  const json::value document = stillframe({"status", "--json", "--socket", socket}).json();
  ASSERT_TRUE(document.is_object());
  EXPECT_EQ(document.at("pid").as_int64(), daemon.pid());
  EXPECT_EQ(document.at("runs").as_array().size(), 1U);
  const Outcome outcome = stillframe({"status", "--socket", socket});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  for (const char* wanted : {"client    trainer", "I/O       ", "in flight 0", "error     none",
                             "newest    1", "lane      host"}) {
    EXPECT_NE(outcome.out.find(wanted), std::string::npos) << wanted << " in\n" << outcome.out;
  }
}

}  // namespace
}  // namespace stillframe::cli
