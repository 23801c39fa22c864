#include "tests/daemon/workload.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/hash.h"
#include "base/text.h"
#include "catalog/aligned_memory.h"
#include "catalog/block_reader.h"
#include "catalog/change.h"
#include "shm/arena.h"

namespace stillframe::daemon {

namespace {

SnapshotPlan small_plan() {
  SnapshotPlan plan;
  std::vector<std::uint64_t> image_bytes;
  for (const auto& [name, bytes] :
       {std::pair<std::string, std::uint64_t>{"model", 1'100'001}, {"optimizer", 9'000}}) {
    format::PartSpec part;
    part.name = name;
    part.tensors.push_back({.name = name + ".w", .dtype = format::Dtype::kU8, .shape = {bytes}});
    plan.parts.push_back(*format::place(part));
    image_bytes.push_back(plan.parts.back().bytes);
    plan.extent_counts.push_back(
        static_cast<std::uint32_t>(format::extent_count(plan.parts.back().bytes)));
    plan.extent_count += plan.extent_counts.back();
    plan.bytes += plan.parts.back().bytes;
  }
  auto slot = *shm::plan_slot(image_bytes);
  plan.part_offsets = slot.part_offsets;
  plan.slot_bytes = slot.slot_bytes;
  return plan;
}

}  // namespace

const std::string Workload::kRunPath = "/data/run";

Workload::Workload() : plan_(small_plan()), memory_(plan_.slot_bytes + kBlockBytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
  slot_ = Bytes(memory_).subspan(round_up(address, kBlockBytes) - address, plan_.slot_bytes);
}

Result<CommittedCheckpoint> Workload::save(uring::IoBackend& io, const std::string& run_id,
                                           std::uint64_t sequence) {
  const auto step = static_cast<std::int64_t>(sequence);
  SnapshotStream stream(plan_, [&io] { io.wake(); });
  capture(step, stream);
  SaveRequest request;
  request.run_path = kRunPath;
  request.run_id = run_id;
  request.instance_nonce = 1;
  request.sequence = sequence;
  request.step = step;
  request.state_json = concat("{\"step\": ", sequence, "}");
  oracle_.began(step);
  auto committed = stillframe::daemon::save(io, {.plan = plan_, .slot = slot_, .stream = stream},
                                            request, hash_pool_);
  if (committed) oracle_.acknowledged(step);
  return committed;
}

std::uint64_t Workload::run(uring::IoBackend& io) {
  std::uint64_t acknowledged = 0;
  if (!io.make_directory("/data") || !io.sync_directory("/")) return 0;
  auto run_id = catalog::create_run(io, kRunPath, std::string(32, 'a'));
  if (!run_id) return 0;
  for (std::uint64_t sequence = 1; sequence <= kSaveCount; ++sequence) {
    auto committed = save(io, *run_id, sequence);
    if (!committed) return acknowledged;
    acknowledged = sequence;
    if (!previous_.empty() &&
        !catalog::retire(io, kRunPath, previous_, {.file_count_max = 8, .bytes_max = 1U << 30})) {
      return acknowledged;
    }
    previous_ = committed->checkpoint().path;
  }
  return acknowledged;
}

void Workload::judge(uring::IoBackend& io, const std::string& where) {
  std::vector<std::int64_t> restorable;
  if (io.status(kRunPath)) {
    // As a daemon opens a run.
    auto run_id = catalog::create_run(io, kRunPath, std::string(32, 'b'));
    ASSERT_TRUE(run_id) << where << ": " << run_id.error().message();
    auto recovered = catalog::recover(io, kRunPath, 2);
    ASSERT_TRUE(recovered) << where << ": " << recovered.error().message();
    auto contents = catalog::read_run(io, kRunPath);
    ASSERT_TRUE(contents) << where << ": " << contents.error().message();
    for (const auto& damaged : contents->damaged) {
      ADD_FAILURE() << where << ": " << damaged.path << ": " << damaged.reason.message();
    }
    auto staging = catalog::allocate_aligned(catalog::kReadBlockBytes);
    ASSERT_TRUE(staging);
    for (const auto& checkpoint : contents->checkpoints) {
      auto complaints = catalog::verify_checkpoint(io, checkpoint, staging->bytes());
      ASSERT_TRUE(complaints) << where;
      for (const std::string& complaint : *complaints) {
        ADD_FAILURE() << where << ": " << checkpoint.path << ": " << complaint;
      }
      expect_right_hashes(io, checkpoint, where);
      restorable.push_back(checkpoint.manifest.step);
    }
  }
  for (const std::string& complaint :
       oracle_.judge(restorable, testing::RunOracle::Retention::kMayLag)) {
    ADD_FAILURE() << where << ": " << complaint;
  }
}

void Workload::capture(std::int64_t step, SnapshotStream& stream) {
  const std::vector<std::vector<std::uint64_t>> hashes = fill(step);
  for (std::uint32_t part = 0; part < hashes.size(); ++part) {
    for (std::uint32_t extent = 0; extent < hashes[part].size(); ++extent) {
      EXPECT_TRUE(stream.accept(
          {.ticket = 1, .part = part, .extent = extent, .hash = hashes[part][extent]}));
    }
  }
  EXPECT_TRUE(stream.complete());
}

std::vector<std::vector<std::uint64_t>> Workload::fill(std::int64_t step) {
  std::vector<std::vector<std::uint64_t>> hashes;
  for (std::size_t part = 0; part < plan_.parts.size(); ++part) {
    const format::PartImage& image = plan_.parts[part];
    const Bytes bytes = plan_.image(slot_, part);
    std::memset(bytes.data(), static_cast<int>(step * 16 + static_cast<int>(part) + 1),
                bytes.size());
    std::memset(bytes.data() + image.bytes, 0, bytes.size() - image.bytes);
    std::memcpy(bytes.data(), image.header.data(), image.header.size());
    hashes.emplace_back();
    for (std::uint64_t offset = 0; offset < image.bytes; offset += kExtentBytes) {
      hashes.back().push_back(hash_extent(
          bytes.subspan(offset, std::min<std::uint64_t>(kExtentBytes, image.bytes - offset))));
    }
  }
  return hashes;
}

void Workload::expect_right_hashes(uring::IoBackend& io, const catalog::Checkpoint& checkpoint,
                                   const std::string& where) {
  auto open = catalog::OpenCheckpoint::open(io, checkpoint);
  ASSERT_TRUE(open) << where << ": " << open.error().message();
  const auto hashes = fill(checkpoint.manifest.step);
  for (std::size_t part = 0; part < hashes.size(); ++part) {
    EXPECT_EQ(open->parts()[part].extent_hashes, hashes[part])
        << where << ": bytes of another step";
  }
}

}  // namespace stillframe::daemon
