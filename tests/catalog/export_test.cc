// Exports, and checkpoints made by a tool: what is on the disk whenever the power goes.
#include "catalog/export.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>

#include "catalog/aligned_memory.h"
#include "catalog/change.h"
#include "catalog/new_checkpoint.h"
#include "tests/catalog/catalog_test.h"
#include "tests/simulated/simulated_backend.h"
#include "tests/simulated/simulated_drive.h"

namespace stillframe::catalog {
namespace {

using simulated::SimulatedBackend;
using simulated::SimulatedDrive;

constexpr char kRun[] = "/data/run";
constexpr char kTarget[] = "/data/model";
constexpr std::uint64_t kNonce = 0x2222;
constexpr std::uint64_t kCrashesPerMoment = 4;

// Tensors of some bytes each, whose bytes are their numbers.
NewCheckpoint wanted_checkpoint() {
  NewCheckpoint wanted{.step = 7, .metrics = {{"loss", 0.5}}};
  wanted.state_json = "{\"format_version\": 1}\n";
  format::PartSpec part{.name = "model", .tensors = {}, .metadata = {{"format", "pt"}}};
  for (int i = 0; i < 5; ++i) {
    const auto dtype = i % 2 == 0 ? format::Dtype::kF32 : format::Dtype::kU8;
    part.tensors.push_back({.name = concat("t", i), .dtype = dtype, .shape = {1501}});
  }
  wanted.parts.push_back(part);
  return wanted;
}

Status fill_with_number(const TensorSlice& slice, Bytes target) {
  std::memset(target.data(), slice.tensor.back(), target.size());
  return ok();
}

Bytes staging() {
  static const Mapping memory = *allocate_aligned(2 * kReadBlockBytes);
  return memory.bytes();
}

std::shared_ptr<SimulatedDrive> new_drive(std::uint64_t seed) {
  auto drive = SimulatedDrive::create({.seed = seed});
  SimulatedBackend io(drive);
  check(io.make_directory("/data").has_value() && io.sync_directory("/").has_value(),
        "a fresh drive takes a directory");
  check(create_run(io, kRun, kTestRunId).has_value(), "and a run");
  check(commit_for_test(io, kRun, {.sequence = 1, .tensor_bytes = {9000}}).has_value(),
        "and a checkpoint");
  return drive;
}

Result<Checkpoint> make_new(uring::IoBackend& io) {
  return commit_new_checkpoint(io, kRun, kNonce, wanted_checkpoint(), fill_with_number, staging(),
                               {});
}

// Cuts the power at each operation of `change` and judges what several crashes may leave.
template <class Change, class Judge>
void cut_everywhere(const Change& prepare, const Change& change, const Judge& judge) {
  for (std::uint64_t cut = 0;; ++cut) {
    auto drive = new_drive(1000 * cut + 1);
    bool is_done = false;
    {
      SimulatedBackend io(drive);
      ASSERT_OK(prepare(io));
      drive->cut_power_at(drive->operation_count() + cut);
      is_done = change(io).has_value();
    }
    for (std::uint64_t crash = 0; crash < kCrashesPerMoment; ++crash) {
      SCOPED_TRACE(concat("cut after operation ", cut, ", crash ", crash));
      SimulatedBackend io(drive->crashed_copy(31 * cut + crash));
      judge(io, is_done);
      if (testing::Test::HasFailure()) return;
    }
    if (!drive->is_power_off()) {
      ASSERT_TRUE(is_done);
      ASSERT_GT(cut, 8u);
      return;
    }
  }
}

using Change = std::function<Status(uring::IoBackend&)>;

TEST(NewCheckpoints, a_power_cut_leaves_the_old_ones_or_the_new_one_as_well) {
  const Change nothing = [](uring::IoBackend&) { return ok(); };
  const Change change = [](uring::IoBackend& io) -> Status {
    auto made = make_new(io);
    if (!made) return std::move(made).error();
    return ok();
  };
  cut_everywhere(nothing, change, [](SimulatedBackend& io, bool is_done) {
    ASSERT_OK(recover(io, kRun, 0x3333));
    auto run = read_run(io, kRun);
    ASSERT_OK(run);
    EXPECT_TRUE(run->damaged.empty());
    EXPECT_EQ(run->checkpoints.size(), is_done ? 2u : run->checkpoints.size());
    EXPECT_GE(run->checkpoints.size(), 1u);
    for (const Checkpoint& checkpoint : run->checkpoints) {
      auto damage = verify_checkpoint(io, checkpoint, staging());
      ASSERT_OK(damage);
      EXPECT_TRUE(damage->empty());
    }
  });
}

TEST(NewCheckpoints, an_error_of_the_source_leaves_the_run_as_it_was) {
  SimulatedBackend io(new_drive(1));
  auto made = commit_new_checkpoint(io, kRun, kNonce, wanted_checkpoint(),
                                    [](const TensorSlice& slice, Bytes) -> Status {
                                      if (slice.tensor == "t3")
                                        return Error(Code::kDataLoss, "the file ends");
                                      return ok();
                                    },
                                    staging(), {});
  ASSERT_FALSE(made);
  EXPECT_EQ(made.error().code(), Code::kDataLoss);
  auto recovered = recover(io, kRun, 0x3333);
  ASSERT_OK(recovered);
  EXPECT_TRUE(recovered->removed_temporaries.empty());
  EXPECT_EQ(read_run(io, kRun)->checkpoints.size(), 1u);
}

TEST(NewCheckpoints, what_no_reader_would_accept_is_refused_before_anything_is_written) {
  NewCheckpoint wanted = wanted_checkpoint();
  EXPECT_OK(check_new_checkpoint(wanted));
  wanted.parts[0].tensors[1].name = "a\nb";
  EXPECT_EQ(check_new_checkpoint(wanted).error().code(), Code::kInvalidArgument);
  wanted = wanted_checkpoint();
  wanted.metrics["a\nb"] = 1;
  EXPECT_EQ(check_new_checkpoint(wanted).error().code(), Code::kInvalidArgument);
}

Status export_again(uring::IoBackend& io, std::uint64_t shard_bytes_max) {
  auto run = read_run(io, kRun);
  if (!run) return std::move(run).error();
  auto opened = OpenCheckpoint::open(io, *run->newest());
  if (!opened) return std::move(opened).error();
  auto target =
      ExportTarget::prepare(io, kTarget, ExportTarget::Kind::kDirectory, true, is_hf_file);
  if (!target) return std::move(target).error();
  auto exported = export_hf(io, opened->parts()[0], {.shard_bytes_max = shard_bytes_max}, *target,
                            staging(), {});
  if (!exported) return std::move(exported).error();
  return ok();
}

TEST(Exports, a_power_cut_leaves_the_old_directory_or_the_new_one_whole) {
  const Change prepare = [](uring::IoBackend& io) -> Status {
    auto made = make_new(io);
    if (!made) return std::move(made).error();
    return export_again(io, 1'000'000);
  };
  const Change change = [](uring::IoBackend& io) { return export_again(io, 7000); };
  cut_everywhere(prepare, change, [](SimulatedBackend& io, bool is_done) {
    auto entries = io.list_directory(kTarget);
    ASSERT_OK(entries);
    const bool is_new = entries->size() == 5;  // Four shards and the index.
    EXPECT_TRUE(is_new || (!is_done && entries->size() == 1)) << entries->size();
    std::size_t tensor_count = 0;
    for (const uring::DirectoryEntry& entry : *entries) {
      if (!entry.name.ends_with(".safetensors")) continue;
      auto file = io.open(concat(kTarget, '/', entry.name), uring::OpenMode::kReadBuffered);
      ASSERT_OK(file);
      auto text = io.read_all(*file, 1 << 20);
      ASSERT_OK(text);
      const ConstBytes bytes = std::as_bytes(std::span(*text));
      auto image = format::decode_part("model", bytes, text->size());
      ASSERT_OK(image);
      for (const format::PlacedTensor& tensor : image->tensors) {
        ++tensor_count;
        const std::string wanted(tensor.bytes, tensor.spec.name.back());
        EXPECT_EQ(text->substr(tensor.offset, tensor.bytes), wanted) << tensor.spec.name;
      }
    }
    EXPECT_EQ(tensor_count, 5u);
  });
}

TEST(Exports, shards_are_as_full_as_their_limit_allows_and_one_tensor_may_be_larger) {
  std::vector<format::PlacedTensor> tensors(6);
  const std::vector<std::uint64_t> bytes = {4, 4, 20, 0, 8, 3};
  for (std::size_t i = 0; i < bytes.size(); ++i) tensors[i].bytes = bytes[i];
  std::vector<std::size_t> sizes;
  for (const auto& shard : split_into_shards(tensors, 10)) sizes.push_back(shard.size());
  EXPECT_EQ(sizes, (std::vector<std::size_t>{2, 1, 2, 1}));
  EXPECT_EQ(split_into_shards({}, 10).size(), 1u);
}

class ExportRanges : public CatalogTest {};
CATALOG_TEST_SUITE(ExportRanges);

TEST_P(ExportRanges, any_run_of_tensors_is_copied_whole_across_blocks) {
  NewCheckpoint wanted = wanted_checkpoint();
  wanted.parts[0].tensors.clear();
  for (int i = 0; i < 9; ++i) {
    wanted.parts[0].tensors.push_back({.name = concat("t", i),
                                       .dtype = format::Dtype::kU8,
                                       .shape = {i == 4 ? 9'000'001u : 700'003u}});
  }
  auto made =
      commit_new_checkpoint(*io_, run_, kNonce, wanted, fill_with_number, staging_.bytes(), {});
  ASSERT_OK(made);
  auto opened = OpenCheckpoint::open(*io_, *made);
  ASSERT_OK(opened);
  auto target = ExportTarget::prepare(*io_, directory_.path() + "/hf",
                                      ExportTarget::Kind::kDirectory, false, is_hf_file);
  ASSERT_OK(target);
  auto exported = export_hf(*io_, opened->parts()[0], {.shard_bytes_max = 1'500'000}, *target,
                            staging_.bytes(), {});
  ASSERT_OK(exported);
  std::size_t tensor_count = 0;
  for (const std::string& name : exported->files) {
    if (!name.ends_with(".safetensors")) continue;
    const std::string text = read_file(directory_.path() + "/hf/" + name);
    auto image = format::decode_part("model", std::as_bytes(std::span(text)), text.size());
    ASSERT_OK(image);
    for (const format::PlacedTensor& tensor : image->tensors) {
      ++tensor_count;
      EXPECT_TRUE(text.substr(tensor.offset, tensor.bytes) ==
                  std::string(tensor.bytes, tensor.spec.name.back()))
          << name << " " << tensor.spec.name;
    }
  }
  EXPECT_EQ(tensor_count, 9u);
}

}  // namespace
}  // namespace stillframe::catalog
