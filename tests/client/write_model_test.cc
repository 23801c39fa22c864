// Whole models and single files on a drive that loses power, fails and fills up: the old one or the
// new one, complete, and never a third thing; and of hashes that lie in the file they guard.
#include "client/write_model.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "base/hash.h"
#include "base/text.h"
#include "catalog/aligned_memory.h"
#include "catalog/block_reader.h"
#include "catalog/run.h"
#include "format/file_hashes.h"
#include "tests/simulated/simulated_backend.h"

namespace stillframe::client {
namespace {

using simulated::OperationKind;
using simulated::SimulatedBackend;
using simulated::SimulatedDrive;

// Three tensors whose bytes follow from `version`; the image has three extents and a bit.
class Contents {
 public:
  explicit Contents(std::uint8_t version) : version_(version) {
    for (const std::uint64_t bytes :
         {std::uint64_t{3'200'000}, std::uint64_t{5}, std::uint64_t{0}}) {
      shapes_.push_back(bytes);
      memory_.emplace_back(bytes, version);
    }
    for (std::size_t i = 0; i < shapes_.size(); ++i) {
      names_.push_back(concat("tensor", i));
      sources_.push_back({.data = memory_[i].data(),
                          .stride_bytes = nullptr,
                          .lazy = 0,
                          .memory = SF_MEMORY_HOST});
    }
    for (std::size_t i = 0; i < shapes_.size(); ++i) {
      tensors_.push_back({.name = names_[i].c_str(),
                          .shape = &shapes_[i],
                          .dimension_count = 1,
                          .dtype = static_cast<std::uint32_t>(format::Dtype::kU8)});
    }
    state_ = concat("{\"version\": ", int{version}, "}");
    metadata_ = {format::kFileStateKey.data(), state_.c_str()};
    part_ = {.name = "model",
             .tensors = tensors_.data(),
             .tensor_count = tensors_.size(),
             .metadata = metadata_.data(),
             .metadata_count = 1};
  }
  Contents(const Contents&) = delete;
  Contents& operator=(const Contents&) = delete;

  Status write_model(uring::IoBackend& io, const std::string& path) const {
    WriteRequest request;
    request.path = path;
    request.nonce = version_;
    request.run_id = std::string(32, 'a');
    request.state_json = state_;
    return client::write_model(io, {&part_, 1}, sources_, request);
  }
  Status write_file(uring::IoBackend& io, const std::string& path) const {
    WriteRequest request;
    request.path = path;
    request.nonce = version_;
    return client::write_file(io, part_, sources_, request);
  }

 private:
  std::uint8_t version_;
  std::vector<std::uint64_t> shapes_;
  std::vector<std::vector<std::uint8_t>> memory_;
  std::vector<std::string> names_;
  std::vector<sf_tensor> tensors_;
  std::vector<sf_source> sources_;
  std::string state_;
  std::vector<const char*> metadata_;
  sf_part part_{};
};

// The version that all extents of what is open belong to; -1, with a complaint: none.
int version_of(uring::IoBackend& io, const catalog::OpenCheckpoint& opened) {
  auto staging = catalog::allocate_aligned(2 * catalog::kReadBlockBytes);
  const catalog::OpenPart& part = opened.parts().front();
  catalog::BlockReader reader(
      io, opened, {{.part = 0, .first_extent = 0, .extent_count = part.extent_hashes.size()}},
      staging->bytes());
  int version = -1;
  for (;;) {
    auto block = reader.next();
    if (!block) {
      ADD_FAILURE() << block.error().message();
      return -1;
    }
    if (!*block) return version;
    const ConstBytes bytes = (*block)->bytes;
    for (std::size_t done = 0; done < bytes.size(); done += kExtentBytes) {
      const auto extent = bytes.subspan(done, std::min(kExtentBytes, bytes.size() - done));
      if (hash_extent(extent) != part.extent_hashes[((*block)->offset + done) / kExtentBytes]) {
        ADD_FAILURE() << "an extent differs from its hash";
        return -1;
      }
    }
    version = std::to_integer<int>(bytes.back());
    reader.recycle(**block);
  }
}

bool is_as_its_hashes(uring::IoBackend& io, const catalog::OpenCheckpoint& opened) {
  auto staging = catalog::allocate_aligned(catalog::kReadBlockBytes);
  const auto& hashes = opened.parts().front().extent_hashes;
  for (std::uint64_t extent = 0; extent < hashes.size(); ++extent) {
    catalog::BlockReader reader(
        io, opened, {{.part = 0, .first_extent = extent, .extent_count = 1}}, staging->bytes());
    auto block = reader.next();
    if (!block || !*block || hash_extent((*block)->bytes) != hashes[extent]) return false;
  }
  return true;
}

int model_version(uring::IoBackend& io, const std::string& path) {
  auto contents = catalog::read_run(io, path);
  if (!contents || contents->checkpoints.size() != 1) return -1;
  auto opened = catalog::OpenCheckpoint::open(io, contents->checkpoints.front());
  if (!opened) {
    ADD_FAILURE() << opened.error().message();
    return -1;
  }
  return version_of(io, *opened);
}

int file_version(uring::IoBackend& io, const std::string& path) {
  auto opened = catalog::OpenCheckpoint::open_file(io, path);
  if (!opened) return -1;
  return version_of(io, *opened);
}

std::size_t entry_count(uring::IoBackend& io, const std::string& path) {
  auto entries = io.list_directory(path);
  return entries ? entries->size() : 0;
}

// What is written, and how it is read back.
struct Kind {
  const char* name;
  Status (Contents::*write)(uring::IoBackend&, const std::string&) const;
  int (*version)(uring::IoBackend&, const std::string&);
};
constexpr Kind kKinds[] = {
    {"model", &Contents::write_model, model_version},
    {"file", &Contents::write_file, file_version},
};

class WriteWhole : public ::testing::TestWithParam<Kind> {
 protected:
  Status write(uring::IoBackend& io, std::uint8_t version) {
    return (Contents(version).*GetParam().write)(io, kPath);
  }
  int version(uring::IoBackend& io) { return GetParam().version(io, kPath); }

  const std::string kPath = "/data/it";
};
INSTANTIATE_TEST_SUITE_P(Kinds, WriteWhole, ::testing::ValuesIn(kKinds),
                         [](const auto& kind) { return kind.param.name; });

TEST_P(WriteWhole, replaces_what_was_there_and_leaves_nothing_else) {
  SimulatedBackend io(SimulatedDrive::create({.seed = 1}));
  ASSERT_TRUE(io.make_directory("/data"));
  for (std::uint8_t number = 1; number <= 3; ++number) {
    auto written = write(io, number);
    ASSERT_TRUE(written) << written.error().message();
    EXPECT_EQ(version(io), number);
    EXPECT_EQ(entry_count(io, "/data"), 1U);
  }
}

TEST_P(WriteWhole, a_power_cut_at_any_operation_leaves_the_old_or_the_new_one) {
  constexpr std::uint64_t kCrashesPerOperation = 4;
  std::uint64_t operation = 0;
  for (bool was_cut = true; was_cut;) {
    ++operation;
    const auto drive = SimulatedDrive::create({.seed = operation});
    drive->cut_power_at(operation);
    int acknowledged = 0;
    {
      SimulatedBackend io(drive);
      if (io.make_directory("/data") && io.sync_directory("/")) {
        for (std::uint8_t number = 1; number <= 2; ++number) {
          if (!write(io, number)) break;
          acknowledged = number;
        }
      }
    }
    was_cut = drive->is_power_off();
    for (std::uint64_t seed = 1; seed <= kCrashesPerOperation; ++seed) {
      SimulatedBackend io(drive->crashed_copy(operation * 1000 + seed));
      const std::string where = concat("operation ", operation, ", seed ", operation * 1000 + seed);
      const int found = io.status(kPath) ? version(io) : 0;
      EXPECT_GE(found, acknowledged) << where;
      EXPECT_LE(found, acknowledged + 1) << where;
      // What the crash left is swept up by the next one.
      if (!io.status("/data")) continue;
      auto again = write(io, 3);
      EXPECT_TRUE(again) << where << ": " << again.error().message();
      EXPECT_EQ(version(io), 3) << where;
      if (HasFailure()) return;
    }
  }
  std::printf("%lu operations, %lu crashes of each\n", static_cast<unsigned long>(operation),
              static_cast<unsigned long>(kCrashesPerOperation));
  EXPECT_GT(operation, 15U);
}

TEST_P(WriteWhole, any_one_failing_operation_keeps_the_old_one_and_is_not_asked_twice) {
  for (std::uint64_t nth = 1;; ++nth) {
    const auto drive = SimulatedDrive::create({.seed = nth, .short_transfers = false});
    SimulatedBackend io(drive);
    ASSERT_TRUE(io.make_directory("/data"));
    ASSERT_TRUE(write(io, 1));
    drive->fail({.nth = nth, .error = EIO});
    const std::uint64_t before = drive->operation_count();
    const auto failed = write(io, 2);
    EXPECT_EQ(drive->syncs_after_failed_sync(), 0U) << "operation " << nth;
    if (failed && drive->operation_count() - before < nth) break;
    drive->clear_faults();
    const int found = version(io);
    if (failed) {
      EXPECT_EQ(found, 2) << "operation " << nth;
    } else {
      EXPECT_EQ(failed.error().code(), Code::kUnavailable) << failed.error().message();
      // A replaced file cannot be put back when its directory does not sync.
      const bool is_replaced = GetParam().version == file_version && found == 2;
      EXPECT_TRUE(found == 1 || is_replaced) << "operation " << nth << ": " << found;
      EXPECT_EQ(entry_count(io, "/data"), 1U) << "operation " << nth;
    }
    if (HasFailure()) return;
    ASSERT_LT(nth, 500U);
  }
}

TEST_P(WriteWhole, a_full_disk_is_said_and_keeps_the_old_one) {
  const auto drive = SimulatedDrive::create({.seed = 5, .capacity_bytes = 5'000'000});
  SimulatedBackend io(drive);
  ASSERT_TRUE(io.make_directory("/data"));
  ASSERT_TRUE(write(io, 1));
  const auto refused = write(io, 2);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), Code::kResourceExhausted) << refused.error().message();
  EXPECT_EQ(version(io), 1);
  EXPECT_EQ(entry_count(io, "/data"), 1U);
}

TEST_P(WriteWhole, what_a_living_writer_makes_is_not_swept_up) {
  const auto drive = SimulatedDrive::create({.seed = 6});
  SimulatedBackend io(drive);
  ASSERT_TRUE(io.make_directory("/data"));
  for (const char* name :
       {"/data/.stillframe-tmp-00000000000000aa", "/data/.stillframe-tmp-note"}) {
    auto file = io.open(name, uring::OpenMode::kCreateDirect);
    ASSERT_TRUE(file);
    io.close(*file);
  }
  ASSERT_TRUE(io.make_directory("/data/.stillframe-tmp-00000000000000bb"));
  drive->set_open_elsewhere("/data/.stillframe-tmp-00000000000000aa", true);
  ASSERT_TRUE(write(io, 1));
  EXPECT_EQ(entry_count(io, "/data"), 4U);
  drive->set_open_elsewhere("/data/.stillframe-tmp-00000000000000aa", false);
  ASSERT_TRUE(write(io, 2));
  EXPECT_EQ(entry_count(io, "/data"), 3U) << "the file goes; what is not ours, or new, stays";
}

TEST(WriteFile, every_flipped_bit_of_the_head_and_many_of_the_data_are_found) {
  const auto drive = SimulatedDrive::create({.seed = 7});
  SimulatedBackend io(drive);
  ASSERT_TRUE(io.make_directory("/data"));
  ASSERT_TRUE(Contents(1).write_file(io, "/data/it"));
  std::vector<std::uint64_t> bits;
  for (std::uint64_t bit = 0; bit < std::uint64_t{8} * 400; ++bit) bits.push_back(bit);
  for (std::uint64_t byte = 4096; byte < 3'200'000; byte += 200'001) {
    bits.push_back(8 * byte + byte % 8);
  }
  for (const std::uint64_t bit : bits) {
    drive->flip_bit("/data/it", bit);
    const auto opened = catalog::OpenCheckpoint::open_file(io, "/data/it");
    if (opened) {
      // Damage in the data, or in the digits of an extent of data, is met when that is read.
      EXPECT_FALSE(is_as_its_hashes(io, *opened)) << "bit " << bit;
    } else {
      EXPECT_EQ(opened.error().code(), Code::kDataLoss) << "bit " << bit;
    }
    drive->flip_bit("/data/it", bit);
  }
  EXPECT_EQ(file_version(io, "/data/it"), 1);
}

TEST(WriteFile, metadata_without_a_state_is_refused) {
  SimulatedBackend io(SimulatedDrive::create({.seed = 8}));
  ASSERT_TRUE(io.make_directory("/data"));
  WriteRequest request;
  request.path = "/data/it";
  const sf_part part{
      .name = "x", .tensors = nullptr, .tensor_count = 0, .metadata = nullptr, .metadata_count = 0};
  const auto refused = write_file(io, part, {}, request);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), Code::kInvalidArgument);
  EXPECT_EQ(entry_count(io, "/data"), 0U);
}

TEST(WriteModel, refuses_what_would_destroy_something_else) {
  SimulatedBackend io(SimulatedDrive::create({.seed = 9}));
  ASSERT_TRUE(io.make_directory("/data"));
  ASSERT_TRUE(io.make_directory("/data/full"));
  ASSERT_TRUE(io.make_directory("/data/full/inner"));
  auto file = io.open("/data/file", uring::OpenMode::kCreateBuffered);
  ASSERT_TRUE(file);
  io.close(*file);
  for (const char* path : {"/data/full", "/data/file", "/data/00000001-step-2", "/"}) {
    const auto refused = Contents(1).write_model(io, path);
    ASSERT_FALSE(refused) << path;
    EXPECT_EQ(refused.error().code(), Code::kInvalidArgument) << path;
  }
  EXPECT_EQ(entry_count(io, "/data"), 2U);
  ASSERT_TRUE(io.make_directory("/data/empty"));
  EXPECT_TRUE(Contents(1).write_model(io, "/data/empty"));
  EXPECT_TRUE(Contents(1).write_model(io, "/data/new/parents/model"));
  EXPECT_EQ(model_version(io, "/data/new/parents/model"), 1);
}

}  // namespace
}  // namespace stillframe::client
