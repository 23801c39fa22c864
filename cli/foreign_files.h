#pragma once

// What an import is made of: tensors that lie somewhere in files of others. Everything about the
// files is checked before the run is touched.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/unique_fd.h"
#include "catalog/new_checkpoint.h"

namespace stillframe::cli {

// A file of somebody else, read through the page cache: it may lie anywhere.
class ForeignFile {
 public:
  // kNotFound, kInvalidArgument: not a regular file, or not readable.
  static Result<ForeignFile> open(const std::string& path);
  // The nameless file that a converter has written to.
  static Result<ForeignFile> of_scratch(UniqueFd fd);

  const std::string& path() const noexcept { return path_; }
  std::uint64_t bytes() const noexcept { return bytes_; }
  // Fills `target`; kDataLoss: the file ends before.
  Status read(std::uint64_t offset, Bytes target) const;

 private:
  ForeignFile(UniqueFd fd, std::string path, std::uint64_t bytes)
      : fd_(std::move(fd)), path_(std::move(path)), bytes_(bytes) {}
  static Result<ForeignFile> of(UniqueFd fd, const std::string& path);

  UniqueFd fd_;
  std::string path_;
  std::uint64_t bytes_ = 0;
};

// Some of a tensor's bytes; a tensor is its segments, one after the other.
struct Segment {
  std::size_t file = 0;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

struct ImportPlan {
  std::vector<ForeignFile> files;
  catalog::NewCheckpoint checkpoint;  // Without step and metrics.
  // For each part, by tensor name.
  std::vector<std::map<std::string, std::vector<Segment>, std::less<>>> sources;
  std::optional<std::int64_t> step;  // What the files say.
  std::vector<std::string> notes;

  // kInvalidArgument: a tensor's segments are not its size or not within their file.
  Status check() const;
  Status fill(const catalog::TensorSlice& slice, Bytes target) const;
};

// One safetensors file becomes the part `part`. kDataLoss: it is corrupt or truncated.
Result<ImportPlan> plan_safetensors(const std::string& path, const std::string& part);
// A directory as save_pretrained() writes it becomes the part "model". kNotFound: a shard that the
// index names is missing; kDataLoss: index and shards disagree.
Result<ImportPlan> plan_hf(const std::string& directory);
// What `stillframe.convert` has found in a file of torch or a directory of DCP. File -1 of its
// answer is `scratch`.
Result<ImportPlan> plan_from_converter(const std::string& answer, UniqueFd scratch);

}  // namespace stillframe::cli
