#include "tests/catalog/commit_for_test.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/hash.h"
#include "base/text.h"
#include "catalog/aligned_memory.h"
#include "catalog/change.h"
#include "catalog/run_files.h"
#include "format/names.h"
#include "format/safetensors.h"
#include "tests/simulated/seeded_rng.h"

namespace stillframe::catalog {

namespace {

std::vector<std::uint64_t> extent_hashes(ConstBytes image) {
  std::vector<std::uint64_t> hashes;
  for (std::size_t offset = 0; offset < image.size(); offset += kExtentBytes) {
    hashes.push_back(
        hash_extent(image.subspan(offset, std::min(kExtentBytes, image.size() - offset))));
  }
  return hashes;
}

Status finish(uring::IoBackend& io, uring::IoRequest request) {
  auto submitted = io.submit(request);
  if (!submitted) return submitted;
  while (io.wait(-1).empty()) {
  }
  if (request.error) return *std::move(request.error);
  return ok();
}

Result<uring::FileId> open_part(uring::IoBackend& io, const std::string& run_path,
                                const std::string& path, std::uint64_t bytes) {
  auto recycled = take_from_spool(io, run_path, bytes, path);
  if (!recycled) return std::move(recycled).error();
  if (*recycled) return **recycled;
  return io.open(path, uring::OpenMode::kCreateDirect);
}

// C3 to C6 of one part.
Status write_part(uring::IoBackend& io, const std::string& run_path, const std::string& path,
                  const std::string& image) {
  auto memory = allocate_aligned(image.size());
  if (!memory) return std::move(memory).error();
  std::memcpy(memory->bytes().data(), image.data(), image.size());
  auto file = open_part(io, run_path, path, image.size());
  if (!file) return std::move(file).error();
  auto done = io.allocate(*file, memory->bytes().size());
  uring::IoRequest request;
  request.kind = uring::IoRequest::Kind::kWrite;
  request.file = *file;
  request.data = memory->bytes().data();
  request.bytes = memory->bytes().size();
  if (done) done = finish(io, request);
  if (done) done = io.truncate(*file, image.size());
  request.kind = uring::IoRequest::Kind::kSync;
  if (done) done = finish(io, request);
  io.close(*file);
  return done;
}

}  // namespace

std::string part_bytes_for_test(const TestCommit& commit, std::size_t index) {
  format::PartSpec spec;
  spec.name = concat("part", index);
  spec.tensors.push_back({.name = concat("tensor", index),
                          .dtype = format::Dtype::kU8,
                          .shape = {commit.tensor_bytes[index]}});
  for (std::size_t i = 0; i < commit.header_tensor_count; ++i) {
    spec.tensors.push_back({.name = concat("empty", i, std::string(100, '.')),
                            .dtype = format::Dtype::kU8,
                            .shape = {0}});
  }
  auto image = format::place(spec);
  check(image.has_value(), "a test's part can be placed");
  std::string bytes = image->header;
  simulated::SeededRng rng(commit.sequence * 1'000'003 + index * 101 +
                           static_cast<std::uint64_t>(commit.step) * 7 +
                           hash128(commit.run_id).low);
  while (bytes.size() < image->bytes) bytes.push_back(static_cast<char>(rng.next()));
  return bytes;
}

std::string state_for_test(const TestCommit& commit) {
  return concat("{\"format_version\": 1, \"extra\": ", commit.sequence, "}\n");
}

Result<Checkpoint> commit_for_test(uring::IoBackend& io, const std::string& run_path,
                                   const TestCommit& commit) {
  const std::string directory = concat(
      private_path(run_path), '/',
      format::temporary_directory_name({.sequence = commit.sequence, .nonce = commit.nonce}));
  Checkpoint checkpoint;
  checkpoint.path =
      concat(run_path, '/',
             format::checkpoint_directory_name({.sequence = commit.sequence, .step = commit.step}));
  format::Manifest& manifest = checkpoint.manifest;
  manifest.run_id = commit.run_id;
  manifest.sequence = commit.sequence;
  manifest.step = commit.step;
  manifest.metrics = commit.metrics;
  manifest.best_rules = commit.best_rules;
  manifest.stillframe_version = "0.1.0";

  auto done = io.make_directory(directory);
  if (!done) return std::move(done).error();
  std::vector<std::vector<std::uint64_t>> hashes;
  for (std::size_t i = 0; i < commit.tensor_bytes.size(); ++i) {
    const std::string image = part_bytes_for_test(commit, i);
    const std::string file = format::part_file_name(concat("part", i), 0, 1);
    done = write_part(io, run_path, concat(directory, '/', file), image);
    if (!done) return std::move(done).error();
    hashes.push_back(extent_hashes(std::as_bytes(std::span(image))));
    manifest.parts.push_back(
        {.file = file, .bytes = image.size(), .root = format::root_of(hashes.back())});
  }
  const std::string sums = format::encode_sums(hashes);
  const std::string state = state_for_test(commit);
  manifest.sums = {
      .file = std::string(format::kSumsName), .bytes = sums.size(), .hash = hash128(sums)};
  manifest.states.push_back({.file = "state.json", .bytes = state.size(), .hash = hash128(state)});

  done = write_small_file(io, concat(directory, '/', format::kSumsName), sums);
  if (done) done = write_small_file(io, concat(directory, "/state.json"), state);
  if (done) {
    done = write_small_file(io, concat(directory, '/', format::kManifestName),
                            format::encode_manifest(manifest));
  }
  if (done) done = io.sync_directory(directory);
  if (done) done = io.sync_directory(spool_path(run_path));
  if (done) done = io.rename(directory, checkpoint.path, uring::RenameMode::kNoReplace);
  if (done) done = io.sync_directory(run_path);
  if (done) done = io.sync_directory(private_path(run_path));
  if (!done) return std::move(done).error();
  return checkpoint;
}

}  // namespace stillframe::catalog
