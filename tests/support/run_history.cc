#include "tests/support/run_history.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>

#include <utility>
#include <vector>

#include "tests/support/trainer.h"

extern char** environ;  // NOLINT: POSIX has no header for it.

namespace stillframe::testing {

namespace {

class History {
 public:
  History(std::string run_path, std::string socket_path, const Say& say)
      : run_path_(std::move(run_path)),
        socket_path_(std::move(socket_path)),
        say_(say),
        trainer_(run_path_, socket_path_, kHistoryKeepLast, 1) {}

  std::string live() {
    const bool is_done = trainer_.attach() == SF_OK && save_one_part() && save_three_parts() &&
                         remove(5) && unpin(2) && trainer_.close() == SF_OK;
    return is_done ? std::string() : doing_ + ": " + trainer_.error().message;
  }

 private:
  // Fresh files, for nothing is there to recycle; the third one's is that of the first, which was
  // retired behind the second.
  bool save_one_part() { return save(1) && save(2) && pin(2) && save(3); }
  // The third is retired behind the fourth, the second is pinned: one recycled file, two fresh.
  bool save_three_parts() { return trainer_.change_parts(3) == SF_OK && save(4) && save(5); }

  void say(std::string_view word, std::int64_t step) {
    doing_ = std::string(word) + " " + std::to_string(step);
    say_(word, step);
  }
  bool save(std::int64_t step) {
    say("begin", step);
    if (trainer_.save_durable(step) != SF_OK) return false;
    say("durable", step);
    return true;
  }
  bool pin(std::int64_t step) { return change("pinning", "pin", "pinned", step); }
  bool unpin(std::int64_t step) { return change("unpinning", "unpin", "unpinned", step); }
  bool remove(std::int64_t step) { return change("removing", "rm", "removed", step); }
  bool change(std::string_view before, const std::string& verb, std::string_view after,
              std::int64_t step) {
    say(before, step);
    if (!command(verb, step)) return false;
    say(after, step);
    return true;
  }

  // No save before it failed, so each has the sequence of its step.
  static std::uint64_t sequence_of(std::int64_t step) { return static_cast<std::uint64_t>(step); }

  // As a person does it, while the daemon holds the run.
  bool command(const std::string& verb, std::int64_t step) const {
    std::vector<std::string> words = {STILLFRAME_CLI, verb,
                                      run_path_ + "@" + std::to_string(sequence_of(step)),
                                      "--socket", socket_path_};
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    (void)::posix_spawn_file_actions_init(&actions);
    (void)::posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
    (void)::posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
    pid_t pid = 0;
    const int spawned = ::posix_spawn(&pid, argv[0], &actions, nullptr, argv.data(), environ);
    (void)::posix_spawn_file_actions_destroy(&actions);
    int status = 0;
    return spawned == 0 && ::waitpid(pid, &status, 0) == pid && WIFEXITED(status) &&
           WEXITSTATUS(status) == 0;
  }

  const std::string run_path_;
  const std::string socket_path_;
  const Say& say_;
  Trainer trainer_;
  std::string doing_ = "attach";  // The last that was said.
};

}  // namespace

std::string live_history(const std::string& run_path, const std::string& socket_path,
                         const Say& say) {
  return History(run_path, socket_path, say).live();
}

}  // namespace stillframe::testing
