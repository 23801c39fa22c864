// F8, F9: bits that flip and sectors that tear on the drive. Each is found before a byte is handed
// out, and the checkpoint before the damaged one is still there (P8).
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "base/text.h"
#include "catalog/aligned_memory.h"
#include "catalog/block_reader.h"
#include "catalog/change.h"
#include "catalog/run.h"
#include "format/names.h"
#include "tests/catalog/commit_for_test.h"
#include "tests/simulated/simulated_backend.h"
#include "tests/simulated/simulated_drive.h"

namespace stillframe::catalog {
namespace {

using simulated::SimulatedBackend;
using simulated::SimulatedDrive;

constexpr char kRun[] = "/data/run";
constexpr std::uint64_t kSectorBytes = 512;
constexpr std::uint64_t kSeed = 20'251;

class Rot : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(io_.make_directory("/data"));
    ASSERT_TRUE(create_run(io_, kRun, kTestRunId));
    for (std::uint64_t sequence = 1; sequence <= 2; ++sequence) {
      auto committed = commit_for_test(
          io_, kRun, {.sequence = sequence, .step = 100, .tensor_bytes = {20'000, 9'000}});
      ASSERT_TRUE(committed) << committed.error().message();
      newest_ = *std::move(committed);
    }
    auto staging = allocate_aligned(kReadBlockBytes);
    ASSERT_TRUE(staging);
    staging_ = *std::move(staging);
  }

  std::string path(std::string_view file) const { return concat(newest_.path, '/', file); }

  std::string content(std::string_view file) {
    auto opened = io_.open(path(file), uring::OpenMode::kReadBuffered);
    EXPECT_TRUE(opened);
    auto bytes = io_.read_all(*opened, std::uint64_t{1} << 20);
    io_.close(*opened);
    EXPECT_TRUE(bytes);
    return *bytes;
  }

  void replace(std::string_view file, std::string_view bytes) {
    ASSERT_TRUE(io_.unlink(path(file)));
    auto created = io_.open(path(file), uring::OpenMode::kCreateBuffered);
    ASSERT_TRUE(created);
    ASSERT_TRUE(io_.write_all(*created, bytes));
    io_.close(*created);
  }

  // The damaged one is named and not among the checkpoints; the one before is the newest.
  void expect_manifest_refused(const std::string& at) {
    auto contents = read_run(io_, kRun);
    ASSERT_TRUE(contents) << at;
    ASSERT_EQ(contents->checkpoints.size(), 1U) << at << ": taken for good";
    EXPECT_EQ(contents->newest()->manifest.sequence, 1U) << at;
    ASSERT_EQ(contents->damaged.size(), 1U) << at;
    EXPECT_EQ(contents->damaged.front().path, newest_.path) << at;
    EXPECT_EQ(contents->next_sequence, 3U) << at << ": a damaged one keeps its sequence";
  }

  std::shared_ptr<SimulatedDrive> drive_ = SimulatedDrive::create({.seed = kSeed});
  SimulatedBackend io_{drive_};
  Checkpoint newest_;
  Mapping staging_;
};

TEST_F(Rot, every_bit_of_the_manifest_is_guarded) {
  const std::uint64_t bit_count = 8 * content(format::kManifestName).size();
  for (std::uint64_t bit = 0; bit < bit_count; ++bit) {
    drive_->flip_bit(path(format::kManifestName), bit);
    expect_manifest_refused(concat("bit ", bit));
    drive_->flip_bit(path(format::kManifestName), bit);
    drive_->clear_trace();
    if (HasFailure()) return;
  }
  std::printf("%lu bits\n", static_cast<unsigned long>(bit_count));
}

TEST_F(Rot, a_manifest_torn_at_any_sector_is_refused) {
  const std::string whole = content(format::kManifestName);
  for (std::uint64_t bytes = 0; bytes < whole.size(); bytes += kSectorBytes) {
    std::string zeros_behind = whole;
    zeros_behind.replace(bytes, std::string::npos, whole.size() - bytes, '\0');
    std::string zeros_before = whole;
    zeros_before.replace(0, std::min<std::size_t>(bytes + 1, whole.size()), bytes + 1, '\0');
    for (const std::string& torn : {whole.substr(0, bytes), zeros_behind, zeros_before}) {
      replace(format::kManifestName, torn);
      expect_manifest_refused(concat("torn at ", bytes));
    }
  }
  replace(format::kManifestName, whole);
  auto contents = read_run(io_, kRun);
  ASSERT_TRUE(contents);
  EXPECT_EQ(contents->newest()->manifest.sequence, 2U);
}

TEST_F(Rot, every_bit_of_the_sums_is_guarded) {
  const std::uint64_t bit_count = 8 * content(format::kSumsName).size();
  for (std::uint64_t bit = 0; bit < bit_count; ++bit) {
    drive_->flip_bit(path(format::kSumsName), bit);
    auto opened = OpenCheckpoint::open(io_, newest_);
    ASSERT_FALSE(opened) << "bit " << bit;
    EXPECT_EQ(opened.error().code(), Code::kDataLoss) << "bit " << bit;
    drive_->flip_bit(path(format::kSumsName), bit);
    drive_->clear_trace();
  }
  std::printf("%lu bits\n", static_cast<unsigned long>(bit_count));
}

TEST_F(Rot, every_bit_of_the_state_is_guarded) {
  const std::string& name = newest_.manifest.states.front().file;
  const std::uint64_t bit_count = 8 * content(name).size();
  auto opened = OpenCheckpoint::open(io_, newest_);
  ASSERT_TRUE(opened);
  for (std::uint64_t bit = 0; bit < bit_count; ++bit) {
    drive_->flip_bit(path(name), bit);
    auto state = opened->read_state(0);
    ASSERT_FALSE(state) << "bit " << bit;
    EXPECT_EQ(state.error().code(), Code::kDataLoss) << "bit " << bit;
    drive_->flip_bit(path(name), bit);
    drive_->clear_trace();
  }
  std::printf("%lu bits\n", static_cast<unsigned long>(bit_count));
}

TEST_F(Rot, ten_thousand_bits_of_the_parts_are_found_each) {
  constexpr int kFlipCount = 10'000;
  std::printf("seed %lu\n", static_cast<unsigned long>(kSeed));
  simulated::SeededRng rng(kSeed);
  for (int i = 0; i < kFlipCount; ++i) {
    const auto& part = newest_.manifest.parts[rng.below(newest_.manifest.parts.size())];
    const std::uint64_t bit = rng.below(8 * part.bytes);
    drive_->flip_bit(path(part.file), bit);
    auto damage = verify_checkpoint(io_, newest_, staging_.bytes());
    ASSERT_TRUE(damage) << damage.error().message();
    ASSERT_EQ(damage->size(), 1U) << part.file << " bit " << bit;
    EXPECT_NE(damage->front().find(part.file), std::string::npos) << damage->front();
    drive_->flip_bit(path(part.file), bit);
    drive_->clear_trace();
  }
}

}  // namespace
}  // namespace stillframe::catalog
