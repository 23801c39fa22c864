// A run directory in which anything may lie: what recovery, the scan and verification make of it.
#include <array>
#include <memory>
#include <string>

#include "base/check.h"
#include "base/text.h"
#include "catalog/aligned_memory.h"
#include "catalog/block_reader.h"
#include "catalog/change.h"
#include "catalog/run.h"
#include "tests/catalog/commit_for_test.h"
#include "tests/fuzz/targets.h"
#include "tests/simulated/simulated_backend.h"

namespace stillframe::fuzz {

using simulated::SimulatedBackend;
using simulated::SimulatedDrive;

namespace {

const std::string kRun = "/data/run";
const std::string kOutside = "/data/outside";

// What the protocol looks for, so that the fuzzer need not guess it.
constexpr std::array kNames = {
    "00000001-step-0",
    "00000002-step-100",
    "00000003-step-7",
    "00000009-step-1",
    ".stillframe",
    "spool",
    "tags",
    "manifest.json",
    "manifest.json.dead",
    "manifest.sums",
    "state.json",
    "part0.safetensors",
    "part1.safetensors",
    "lock",
    "run-id",
    "sequence",
    "sequence~",
    "paper",
    "paper~",
    "latest",
    "best",
    "1",
    "2",
    "tmp-00000003-0000000000001111",
    "tmp-00000004-00000000",
    "notes.txt",
};

class Reader {
 public:
  explicit Reader(ConstBytes input) : input_(input) {}
  bool is_at_end() const { return input_.empty(); }
  std::size_t byte() {
    if (input_.empty()) return 0;
    const auto value = std::to_integer<std::size_t>(input_.front());
    input_ = input_.subspan(1);
    return value;
  }
  std::string text() {
    const std::size_t wanted = byte();
    const std::size_t bytes = std::min(wanted, input_.size());
    std::string text(reinterpret_cast<const char*>(input_.data()), bytes);
    input_ = input_.subspan(bytes);
    return text;
  }
  // A known name, or now and then one of the fuzzer's own without what a file system has no names
  // for.
  std::string name() {
    const std::size_t choice = byte();
    if (choice < 0xF0) return kNames[choice % kNames.size()];
    std::string own = text();
    for (char& c : own) {
      if (c == '/' || c == '\0') c = '_';
    }
    return own.empty() || own == "." || own == ".." ? "x" : own;
  }
  // One or two levels below the run.
  std::string path() {
    std::string path = kRun + '/' + name();
    if (byte() % 2 == 1) path += '/' + name();
    if (byte() % 4 == 3) path += '/' + name();
    return path;
  }

 private:
  ConstBytes input_;
};

void write_file(SimulatedBackend& io, const std::string& path, std::string_view bytes) {
  (void)io.unlink(path);
  auto file = io.open(path, uring::OpenMode::kCreateBuffered);
  if (!file) return;
  (void)io.write_all(*file, bytes);
  io.close(*file);
}

std::string read_file(SimulatedBackend& io, const std::string& path) {
  auto file = io.open(path, uring::OpenMode::kReadBuffered);
  check(file.has_value(), "what is outside stays");
  auto bytes = io.read_all(*file, 1 << 20);
  io.close(*file);
  check(bytes.has_value(), "what is outside stays readable");
  return *bytes;
}

void change(SimulatedBackend& io, Reader& reader) {
  const std::size_t kind = reader.byte() % 6;
  const std::string path = reader.path();
  switch (kind) {
    case 0: (void)io.make_directory(path); break;
    case 1: write_file(io, path, reader.text()); break;
    case 2: (void)io.make_symlink(reader.byte() % 2 == 0 ? kOutside : reader.path(), path); break;
    case 3: (void)io.unlink(path); break;
    case 4: (void)io.rename(path, reader.path(), uring::RenameMode::kReplace); break;
    default: (void)io.remove_directory(path);
  }
}

}  // namespace

bool recovery_tree(ConstBytes input) {
  const auto drive = SimulatedDrive::create({.seed = 1, .short_transfers = false});
  SimulatedBackend io(drive);
  check(io.make_directory("/data") && io.make_directory(kOutside), "a fresh drive");
  write_file(io, kOutside + "/precious", "precious");
  check(catalog::create_run(io, kRun, catalog::kTestRunId).has_value(), "a fresh run");
  check(catalog::commit_for_test(io, kRun, {.sequence = 2, .step = 100, .tensor_bytes = {100}})
            .has_value(),
        "a first checkpoint");
  Reader reader(input);
  for (int i = 0; i < 64 && !reader.is_at_end(); ++i) change(io, reader);

  auto recovered = catalog::recover(io, kRun, 2);
  check(read_file(io, kOutside + "/precious") == "precious", "nothing outside is touched");
  auto contents = catalog::read_run(io, kRun);
  if (contents) {
    static const Mapping staging = *catalog::allocate_aligned(catalog::kReadBlockBytes);
    for (const catalog::Checkpoint& checkpoint : contents->checkpoints) {
      check(checkpoint.path.starts_with(kRun), "a run's checkpoints are in it");
      (void)catalog::verify_checkpoint(io, checkpoint, staging.bytes());
    }
  }
  check(io.open_file_count() == 0, "every file is closed");
  if (!recovered) return false;
  auto again = catalog::recover(io, kRun, 2);
  check(again.has_value(), "what was recovered once can be again");
  check(again->removed_temporaries.empty() && again->finished_victims.empty(),
        "the second time there is nothing to do");
  auto unchanged = catalog::read_run(io, kRun);
  check(contents.has_value() == unchanged.has_value(), "the second time changes nothing");
  if (contents) {
    check(contents->checkpoints.size() == unchanged->checkpoints.size(), "none comes or goes");
  }
  return contents.has_value();
}

}  // namespace stillframe::fuzz
