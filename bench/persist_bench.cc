// How long a captured snapshot takes to DURABLE, against the drive itself: 2 GiB to recycled and to
// fresh files, and the commit of 1 MiB. The daemon's own save path, without a client.
//
//   persist_bench --path DIRECTORY [--mib N] [--rounds N] [--fresh-rounds N] [--commits N]
//
// The raw write that a recycled file is measured against alternates between two files, as a run
// does that keeps one checkpoint while it writes the next: with a drive behind a cache of gigabytes
// it matters whether a file is written again at once. The same file again and again is beside it.
//
// Prints JSON Lines: a header, a line per run, a summary per ratio. Exit status 1 when a save
// fails, 3 when too few rounds were valid.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/hash.h"
#include "base/text.h"
#include "bench/raw/raw.h"
#include "bench/rounds.h"
#include "catalog/change.h"
#include "catalog/run.h"
#include "daemon/hash_pool.h"
#include "daemon/save.h"
#include "shm/arena.h"
#include "uring/io_backend.h"

namespace stillframe::bench {
namespace {

[[noreturn]] void fail(std::string_view doing, const Error& error) {
  std::fprintf(stderr, "persist_bench: %.*s: %s\n", static_cast<int>(doing.size()), doing.data(),
               std::string(error.message()).c_str());
  std::exit(1);
}

template <class T>
T expect(std::string_view doing, Result<T> result) {
  if (!result) fail(doing, result.error());
  return *std::move(result);
}

daemon::SnapshotPlan plan_of(std::uint64_t tensor_bytes) {
  format::PartSpec part;
  part.name = "model";
  part.tensors.push_back({.name = "weight", .dtype = format::Dtype::kU8, .shape = {tensor_bytes}});
  daemon::SnapshotPlan plan;
  plan.parts.push_back(expect("place", format::place(part)));
  const std::vector<std::uint64_t> image_bytes = {plan.parts[0].bytes};
  shm::SlotPlan slot = expect("plan", shm::plan_slot(image_bytes));
  plan.part_offsets = std::move(slot.part_offsets);
  plan.slot_bytes = slot.slot_bytes;
  plan.extent_count = format::extent_count(plan.parts[0].bytes);
  plan.extent_counts.push_back(static_cast<std::uint32_t>(plan.extent_count));
  plan.bytes = plan.parts[0].bytes;
  return plan;
}

// One captured snapshot in an arena as the daemon makes it, saved again and again.
class Saver {
 public:
  Saver(uring::IoBackend& io, std::string run_path, std::uint64_t tensor_bytes)
      : io_(io),
        run_path_(std::move(run_path)),
        plan_(plan_of(tensor_bytes)),
        arena_(expect("arena", shm::Arena::create(plan_.slot_bytes))) {
    const std::atomic<bool> stop = false;
    pages_ = expect("prefault", arena_.prefault(0, plan_.slot_bytes, stop));
    const format::PartImage& image = plan_.parts[0];
    std::uint64_t state = 1;
    for (std::uint64_t at = 0; at + 8 <= image.bytes; at += 8) {
      // Knuth's MMIX generator: no block repeats, no page is zero.
      state = state * 6364136223846793005U + 1442695040888963407U;
      store_u64(arena_.bytes().data() + at, state);
    }
    std::memcpy(arena_.bytes().data(), image.header.data(), image.header.size());
    std::memset(arena_.bytes().data() + image.bytes, 0,
                round_up(image.bytes, kBlockBytes) - image.bytes);
    for (std::uint64_t i = 0; i < plan_.extent_count; ++i) {
      const std::uint64_t offset = i * kExtentBytes;
      hashes_.push_back(hash_extent(arena_.bytes().subspan(
          offset, std::min<std::uint64_t>(kExtentBytes, image.bytes - offset))));
    }
    is_registered_ = static_cast<bool>(io_.register_memory(arena_.bytes()));
    run_id_ = expect("create run", catalog::create_run(io_, run_path_, std::string(32, 'a')));
  }
  ~Saver() { io_.unregister_memory(arena_.bytes()); }
  Saver(const Saver&) = delete;
  Saver& operator=(const Saver&) = delete;

  // A whole save, C1 to C10. Returns the seconds of C4 and C5 alone: until the drive had taken
  // every byte and every hash was checked again. What is left is the flush and the commit.
  double save() {
    daemon::SnapshotStream stream(plan_, [this] { io_.wake(); });
    for (std::uint32_t i = 0; i < hashes_.size(); ++i) {
      (void)expect("accept",
                   stream.accept({.ticket = 1, .part = 0, .extent = i, .hash = hashes_[i]}));
    }
    (void)expect("complete", stream.complete());
    daemon::SaveRequest request;
    request.run_path = run_path_;
    request.run_id = run_id_;
    request.instance_nonce = 1;
    request.sequence = ++sequence_;
    request.state_json = "{\"format_version\": 1}";
    const daemon::Snapshot snapshot{.plan = plan_, .slot = arena_.bytes(), .stream = stream};
    auto staged = expect("stage", daemon::stage(io_, plan_, request));
    const double begin = raw::now_seconds();
    const auto written = expect("write", daemon::write(io_, staged, snapshot, hash_pool_));
    const double taken_seconds = raw::now_seconds() - begin;
    const auto shard = expect("sync", daemon::make_durable(io_, staged, written, plan_, request));
    const auto committed = expect("commit", daemon::commit(io_, staged, shard, request));
    previous_ = std::exchange(newest_, committed.checkpoint().path);
    return taken_seconds;
  }

  // What follows a save in a run that keeps one: its predecessor's file goes to the spool.
  void retire_previous() {
    if (!previous_) return;
    (void)expect("retire", catalog::retire(io_, run_path_, *previous_,
                                           {.file_count_max = 8, .bytes_max = 4 * plan_.bytes}));
    previous_.reset();
  }
  void empty_spool() { (void)expect("empty spool", catalog::empty_spool(io_, run_path_)); }

  std::string_view pages() const { return shm::name(pages_); }
  bool is_registered() const { return is_registered_; }

 private:
  uring::IoBackend& io_;
  std::string run_path_;
  daemon::SnapshotPlan plan_;
  shm::Arena arena_;
  shm::PageKind pages_ = shm::PageKind::kUntouched;
  std::vector<std::uint64_t> hashes_;
  daemon::HashPool hash_pool_{1};
  bool is_registered_ = false;
  std::string run_id_;
  std::uint64_t sequence_ = 0;
  std::optional<std::string> newest_;
  std::optional<std::string> previous_;
};

struct Options {
  std::string path;
  std::uint64_t mib = 2048;
  std::size_t rounds = 4;
  std::size_t fresh_rounds = 2;
  std::size_t commits = 200;
};

// The part of a save that is ours where the drive's flush takes most of it: until the drive has
// taken every byte and every hash was checked again. Of a size that its cache takes without a
// pause.
void measure_taking(uring::IoBackend& io, const std::string& directory) {
  constexpr std::uint64_t kBytes = std::uint64_t{256} << 20;
  constexpr int kRunCount = 15;
  Saver saver(io, concat(directory, "/taken"), kBytes - kBlockBytes);
  const raw::Memory memory(kBytes);
  const std::string raw_path = concat(directory, "/raw_taken");
  (void)saver.save();
  (void)saver.save();
  std::vector<double> ours;
  std::vector<double> raw_seconds;
  for (int i = 0; i < kRunCount; ++i) {
    raw_seconds.push_back(raw::write_phases(raw_path, memory, raw::FileState::kReused).taken);
    saver.retire_previous();
    ours.push_back(saver.save());
  }
  JsonLine()
      .add("figure", "writes taken and checked, without the flush / raw, medians, 256 MiB")
      .add("value", median(ours) / median(raw_seconds))
      .add("seconds", median(ours))
      .add("raw_seconds", median(raw_seconds))
      .add("target_max", 1 / 0.95)
      .print();
}

int run(const Options& options) {
  auto created = expect("backend", uring::create_backend({}));
  uring::IoBackend& io = *created.backend;
  const std::uint64_t bytes = options.mib << 20;

  header_line("persist")
      .add("bytes", bytes)
      .add("io_backend", io.name())
      .add("checksum", "xxh3-64 by 4 KiB leaves, checked after the write")
      .print();
  bool enough = true;
  {
    Saver saver(io, concat(options.path, "/run"), bytes - kBlockBytes);
    const raw::Memory memory(bytes);
    std::uint64_t turn = 0;
    const auto raw_write = [&](const std::string& file, raw::FileState state) {
      return with_cpu_time(
          [&] { return raw::write_seconds(concat(options.path, '/', file), memory, state); });
    };
    const auto raw_alternating = [&] {
      return raw_write(++turn % 2 == 0 ? "raw_a" : "raw_b", raw::FileState::kReused);
    };
    for (int i = 0; i < 2; ++i) {
      (void)saver.save();
      (void)raw_alternating();
    }
    saver.retire_previous();

    Contender recycled{.name = "persist_recycled",
                       .run = [&] { return timed([&] { (void)saver.save(); }); },
                       .prepare = [&] { saver.retire_previous(); }};
    Contender same_file{.name = "raw_write_same_file",
                        .run = [&] { return raw_write("raw_a", raw::FileState::kReused); }};
    Rounds rounds({.valid_rounds = options.rounds, .attempts_per_round = 2},
                  {{.name = "raw_write_alternating", .run = raw_alternating}},
                  {std::move(recycled), std::move(same_file)});
    enough = rounds.run();
    JsonLine().add("pages", saver.pages()).add("registered", saver.is_registered()).print();
    (void)rounds.summarise("persist_recycled/raw_write_alternating", "persist_recycled",
                           "raw_write_alternating", 1 / 0.95);
    (void)rounds.summarise("persist_recycled/raw_write_same_file", "persist_recycled",
                           "raw_write_same_file", 1 / 0.95);
    Contender fresh{.name = "persist_fresh",
                    .run = [&] { return timed([&] { (void)saver.save(); }); },
                    .prepare =
                        [&] {
                          saver.retire_previous();
                          saver.empty_spool();
                        }};
    const auto raw_fresh = [&] { return raw_write("raw_fresh", raw::FileState::kFresh); };
    Rounds fresh_rounds({.valid_rounds = options.fresh_rounds, .attempts_per_round = 2},
                        {{.name = "raw_write_fresh", .run = raw_fresh}}, {std::move(fresh)});
    enough = fresh_rounds.run() && enough;
    (void)fresh_rounds.summarise("persist_fresh/raw_write_fresh", "persist_fresh",
                                 "raw_write_fresh", 1.1);
  }

  measure_taking(io, options.path);

  // Latency: many small commits in turn with the raw one, medians compared.
  Saver saver(io, concat(options.path, "/small"), (std::uint64_t{1} << 20) - kBlockBytes);
  const raw::Memory memory(std::size_t{1} << 20);
  std::vector<double> ours;
  std::vector<double> raw_seconds;
  for (std::size_t i = 0; i < options.commits; ++i) {
    raw_seconds.push_back(raw::commit_seconds(options.path, memory));
    ours.push_back(timed([&] { (void)saver.save(); }).seconds);
    saver.retire_previous();
  }
  std::vector<double> sorted = ours;
  std::sort(sorted.begin(), sorted.end());
  JsonLine()
      .add("summary", "commit_1_mib/raw_commit")
      .add("ratio", median(ours) / median(raw_seconds))
      .add("p50_ms", 1e3 * median(ours))
      .add("p99_ms", 1e3 * sorted[sorted.size() * 99 / 100])
      .add("raw_p50_ms", 1e3 * median(raw_seconds))
      .add("target_max", 2.5)
      .print();
  return enough ? 0 : 3;
}

}  // namespace
}  // namespace stillframe::bench

int main(int argc, char** argv) {
  stillframe::bench::Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const std::string value = argv[i + 1];
    if (name == "--path") options.path = value;
    if (name == "--mib") options.mib = std::stoull(value);
    if (name == "--rounds") options.rounds = std::stoull(value);
    if (name == "--fresh-rounds") options.fresh_rounds = std::stoull(value);
    if (name == "--commits") options.commits = std::stoull(value);
  }
  if (options.path.empty()) {
    std::fputs(
        "usage: persist_bench --path DIRECTORY [--mib N] [--rounds N] [--fresh-rounds N] "
        "[--commits N]\n",
        stderr);
    return 2;
  }
  return stillframe::bench::run(options);
}
