#include "tests/support/trainer.h"

#include <dirent.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <utility>

extern char** environ;

namespace stillframe::testing {

namespace fs = std::filesystem;

ScratchDirectory::ScratchDirectory() {
  std::string pattern = fs::temp_directory_path().string() + "/stillframe-test-XXXXXX";
  if (::mkdtemp(pattern.data()) == nullptr) std::abort();
  path_ = pattern;
}

ScratchDirectory::~ScratchDirectory() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

DaemonProcess::DaemonProcess(std::string socket_path, const Variables& variables)
    : socket_path_(std::move(socket_path)) {
  std::vector<std::string> environment;
  for (const auto& [name, value] : variables) environment.push_back(name + "=" + value);
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    if (!variables.contains(text.substr(0, text.find('=')))) environment.push_back(text);
  }
  std::vector<char*> envp;
  for (std::string& entry : environment) envp.push_back(entry.data());
  envp.push_back(nullptr);

  // Elsewhere than it was built, as the client would be told.
  const char* const elsewhere = std::getenv("STILLFRAME_DAEMON");
  std::string program = elsewhere != nullptr ? elsewhere : STILLFRAMED_PATH;
  std::string socket_option = "--socket=" + socket_path_;
  std::string log_option = "--log-level=error";
  char* argv[] = {program.data(), socket_option.data(), log_option.data(), nullptr};
  posix_spawn_file_actions_t actions;
  (void)::posix_spawn_file_actions_init(&actions);
  // It must not hold our output open when this process dies before it.
  (void)::posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
  const std::string log_path = socket_path_ + ".log";
  (void)::posix_spawn_file_actions_addopen(&actions, 2, log_path.c_str(),
                                           O_WRONLY | O_CREAT | O_APPEND, 0600);
  if (::posix_spawn(&pid_, program.c_str(), &actions, nullptr, argv, envp.data()) != 0) pid_ = -1;
  (void)::posix_spawn_file_actions_destroy(&actions);
}

DaemonProcess::~DaemonProcess() { kill_now(); }

bool DaemonProcess::is_alive() {
  if (pid_ < 0) return false;
  int status = 0;
  if (::waitpid(pid_, &status, WNOHANG) == 0) return true;
  pid_ = -1;
  return false;
}

bool DaemonProcess::wait_listening() {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, socket_path_.c_str(), sizeof address.sun_path - 1);
  // There is no event to wait for before the socket exists; 20 s is for a loaded sanitizer build.
  for (int i = 0; i < 2000 && is_alive(); ++i) {
    const int probe = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    const int connected =
        ::connect(probe, reinterpret_cast<const sockaddr*>(&address), sizeof address);
    (void)::close(probe);
    if (connected == 0) return true;
    (void)::usleep(10'000);
  }
  return false;
}

void DaemonProcess::kill_now() {
  if (pid_ < 0) return;
  (void)::kill(pid_, SIGKILL);
  (void)::waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

int DaemonProcess::stop() {
  if (pid_ < 0) return -1;
  (void)::kill(pid_, SIGTERM);
  int status = 0;
  (void)::waitpid(pid_, &status, 0);
  pid_ = -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

State::State(std::size_t part_count) : tensors_by_part_(part_count) {
  constexpr std::uint32_t kU8 = 1;
  static constexpr const char* kNames[] = {"model", "optimizer", "ema"};
  static constexpr const char* kPrefixes[] = {"weight.", "optimizer.state.weight.", "ema.weight."};
  // The part of each where there are three; with fewer, the last takes what is left.
  const std::vector<std::pair<std::size_t, std::vector<std::uint64_t>>> shapes = {
      {0, {1'500'001}}, {0, {}},       {0, {0, 4}},      {0, {4095}}, {0, {4097}},
      {0, {17, 3}},     {1, {70'000}}, {2, {1'048'576}}, {2, {511}}};
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    std::uint64_t bytes = 1;
    for (const std::uint64_t dimension : shapes[i].second) bytes *= dimension;
    const std::size_t part = std::min(shapes[i].first, part_count - 1);
    tensors_.push_back({.name = kPrefixes[part] + std::to_string(i),
                        .shape = shapes[i].second,
                        .bytes = std::vector<std::uint8_t>(bytes),
                        .part = part});
  }
  for (const Tensor& tensor : tensors_) {
    tensors_by_part_[tensor.part].push_back(
        {.name = tensor.name.c_str(),
         .shape = tensor.shape.data(),
         .dimension_count = static_cast<std::uint32_t>(tensor.shape.size()),
         .dtype = kU8});
  }
  for (std::size_t i = 0; i < part_count; ++i) {
    parts_.push_back({.name = kNames[i],
                      .tensors = tensors_by_part_[i].data(),
                      .tensor_count = tensors_by_part_[i].size(),
                      .metadata = nullptr,
                      .metadata_count = 0});
  }
}

std::uint8_t State::byte_at(std::int64_t step, std::size_t tensor, std::size_t offset) {
  const std::uint64_t mixed =
      (static_cast<std::uint64_t>(step) * 1'000'003 + tensor * 131 + offset) * 0x9E3779B97F4A7C15U;
  return static_cast<std::uint8_t>(mixed >> 56);
}

void State::fill(std::int64_t step) {
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    for (std::size_t i = 0; i < tensors_[t].bytes.size(); ++i) {
      tensors_[t].bytes[i] = byte_at(step, t, i);
    }
  }
}

bool State::holds(std::int64_t step) const {
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    for (std::size_t i = 0; i < tensors_[t].bytes.size(); ++i) {
      if (tensors_[t].bytes[i] != byte_at(step, t, i)) return false;
    }
  }
  return true;
}

void State::clear() {
  for (Tensor& tensor : tensors_) std::fill(tensor.bytes.begin(), tensor.bytes.end(), 0);
}

std::vector<sf_source> State::sources(bool lazy) const {
  std::vector<sf_source> sources;
  for (const Tensor& tensor : tensors_) {
    sources.push_back({.data = tensor.bytes.data(),
                       .stride_bytes = nullptr,
                       .lazy = lazy ? 1U : 0U,
                       .memory = SF_MEMORY_HOST});
  }
  return sources;
}

std::vector<sf_target> State::targets() {
  std::vector<sf_target> targets;
  for (Tensor& tensor : tensors_) {
    targets.push_back({.part_index = tensor.part,
                       .name = tensor.name.c_str(),
                       .data = tensor.bytes.data(),
                       .bytes = tensor.bytes.size(),
                       .stride_bytes = nullptr,
                       .memory = SF_MEMORY_HOST,
                       .reserved = 0});
  }
  return targets;
}

Trainer::Trainer(std::string run_path, std::string socket_path, std::uint32_t keep_last,
                 std::size_t part_count)
    : run_path_(std::move(run_path)),
      socket_path_(std::move(socket_path)),
      keep_last_(keep_last),
      state_(part_count) {}

Trainer::~Trainer() {
  if (session_ != nullptr) (void)sf_session_close(session_, 1000, nullptr);
}

int Trainer::attach() {
  sf_attach_options options{};
  options.struct_bytes = sizeof options;
  options.world_size = 1;
  options.keep_last = keep_last_;
  options.no_autostart = 1;
  options.run_path = run_path_.c_str();
  options.socket_path = socket_path_.c_str();
  const int attached = sf_attach(&options, &session_, &error_);
  if (attached != SF_OK) return attached;
  return sf_layout_register(session_, state_.parts().data(), state_.parts().size(), 10'000,
                            &error_);
}

int Trainer::change_parts(std::size_t count) {
  state_ = State(count);
  return sf_layout_register(session_, state_.parts().data(), state_.parts().size(), 10'000,
                            &error_);
}

int Trainer::save(std::int64_t step, std::uint64_t* ticket, std::uint32_t busy_timeout_ms) {
  state_.fill(step);
  return begin_save(step, ticket, busy_timeout_ms);
}

int Trainer::begin_save(std::int64_t step, std::uint64_t* ticket, std::uint32_t busy_timeout_ms) {
  const std::string json = "{\"format_version\": 1, \"extra\": " + std::to_string(step) + "}";
  sf_save_options options{};
  options.struct_bytes = sizeof options;
  options.capture = SF_CAPTURE_EAGER;
  options.busy_timeout_ms = busy_timeout_ms;
  options.step = step;
  options.state_json = json.c_str();
  options.state_bytes = json.size();
  const std::vector<sf_source> sources = state_.sources(false);
  return sf_save_begin(session_, &options, sources.data(), sources.size(), ticket, &error_);
}

int Trainer::save_durable(std::int64_t step) {
  std::uint64_t ticket = 0;
  const int begun = save(step, &ticket);
  if (begun != SF_OK) return begun;
  return sf_ticket_wait(session_, ticket, SF_DURABLE, 20'000, &error_);
}

int Trainer::close() { return sf_session_close(std::exchange(session_, nullptr), 5'000, &error_); }

namespace {

// Temporary directories, which should not outlast a recovery.
void look_for_leftovers(const std::string& run_path, Verdict& verdict) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(run_path + "/.stillframe", ignored)) {
    if (entry.path().filename().string().starts_with("tmp-")) {
      verdict.leftovers.push_back(entry.path().filename().string());
    }
  }
}

// The numbers of the checkpoints that tags name.
std::set<std::uint64_t> tagged_sequences(const std::string& run_path) {
  std::set<std::uint64_t> sequences;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(run_path + "/.stillframe/tags", ignored)) {
    std::uint64_t sequence = 0;
    if (entry.path().filename().string().ends_with("~")) continue;  // Never finished.
    if (std::ifstream(entry.path()) >> sequence) sequences.insert(sequence);
  }
  return sequences;
}

std::size_t part_count(const sf_checkpoint* checkpoint) {
  std::size_t count = 0;
  while (sf_checkpoint_header(checkpoint, count) != nullptr) ++count;
  return count;
}

}  // namespace

Verdict judge(const std::string& run_path) {
  Verdict verdict;
  look_for_leftovers(run_path, verdict);
  std::error_code ignored;
  std::vector<std::pair<std::string, std::int64_t>> found;
  for (const auto& entry : fs::directory_iterator(run_path, ignored)) {
    const std::string name = entry.path().filename().string();
    const auto mark = name.find("-step-");
    if (fs::is_symlink(entry.path()) || mark == std::string::npos) continue;
    if (!fs::exists(entry.path() / "manifest.json", ignored)) {
      verdict.leftovers.push_back(name);
      continue;
    }
    found.emplace_back(name.substr(0, mark), std::stoll(name.substr(mark + 6)));
  }
  std::sort(found.begin(), found.end());
  const std::set<std::uint64_t> tagged = tagged_sequences(run_path);
  for (const auto& [sequence, step] : found) {
    if (tagged.contains(std::stoull(sequence))) verdict.pinned.insert(step);
    sf_error error{};
    sf_checkpoint* checkpoint = nullptr;
    const std::string selector = std::to_string(std::stoull(sequence));
    if (sf_checkpoint_open(run_path.c_str(), selector.c_str(), nullptr, &checkpoint, &error) !=
        SF_OK) {
      verdict.complaints.push_back(sequence + ": " + error.message);
      continue;
    }
    State state(part_count(checkpoint));
    const std::vector<sf_target> targets = state.targets();
    const int read =
        sf_checkpoint_read(checkpoint, targets.data(), targets.size(), nullptr, &error);
    sf_checkpoint_close(checkpoint);
    if (read != SF_OK) {
      verdict.complaints.push_back(sequence + ": " + error.message);
    } else if (!state.holds(step)) {
      verdict.complaints.push_back(sequence + ": the bytes are not those of step " +
                                   std::to_string(step));
    } else {
      verdict.steps.push_back(step);
    }
  }
  return verdict;
}

}  // namespace stillframe::testing
