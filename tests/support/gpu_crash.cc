#include "tests/support/gpu_crash.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <utility>
#include <vector>

#include "base/check.h"

namespace stillframe::testing {

namespace {

// Ours, with another folder that is searched for a driver.
std::vector<std::string> environment_with(const std::string& driver_folder) {
  std::vector<std::string> variables;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (!std::string(*entry).starts_with("LD_LIBRARY_PATH=")) variables.emplace_back(*entry);
  }
  variables.push_back("LD_LIBRARY_PATH=" + driver_folder);
  return variables;
}

std::vector<char*> pointers_to(std::vector<std::string>& words) {
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  pointers.push_back(nullptr);
  return pointers;
}

}  // namespace

GpuCrashTrainer::GpuCrashTrainer(Setting setting) {
  const std::string program =
      std::filesystem::read_symlink("/proc/self/exe").parent_path() / "gpu_crash_trainer";
  std::vector<std::string> words = {program, std::move(setting.run_path),
                                    std::move(setting.socket_path),
                                    std::to_string(setting.first_step), std::move(setting.lane)};
  if (setting.breaks) words.emplace_back("break");
  std::vector<std::string> variables = environment_with(setting.driver_folder);
  int ends[2] = {};
  check(::pipe2(ends, O_CLOEXEC) == 0, "a pipe");
  posix_spawn_file_actions_t actions;
  (void)::posix_spawn_file_actions_init(&actions);
  (void)::posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
  check(::posix_spawn(&pid_, program.c_str(), &actions, nullptr, pointers_to(words).data(),
                      pointers_to(variables).data()) == 0,
        "the trainer starts");
  (void)::posix_spawn_file_actions_destroy(&actions);
  (void)::close(ends[1]);
  lines_ = ::fdopen(ends[0], "r");
}

GpuCrashTrainer::~GpuCrashTrainer() {
  kill_now();
  std::fclose(lines_);
  if (pid_ > 0) (void)::waitpid(pid_, nullptr, 0);
}

std::optional<GpuCrashTrainer::Said> GpuCrashTrainer::listen() {
  char word[16] = {};
  long long step = 0;
  if (std::fscanf(lines_, "%15s %lld", word, &step) != 2) return std::nullopt;
  return Said{.word = word, .step = step};
}

void GpuCrashTrainer::kill_now() {
  if (pid_ > 0) (void)::kill(pid_, SIGKILL);
}

int GpuCrashTrainer::wait() {
  int status = 0;
  check(::waitpid(std::exchange(pid_, -1), &status, 0) > 0, "the trainer is a child");
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace stillframe::testing
