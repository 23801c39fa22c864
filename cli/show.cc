#include <string>
#include <vector>

#include "base/hash.h"
#include "base/text.h"
#include "catalog/block_reader.h"
#include "cli/commands.h"
#include "cli/json.h"
#include "cli/run_access.h"
#include "cli/text.h"

namespace stillframe::cli {

namespace {

namespace json = boost::json;

std::string shape_text(const std::vector<std::uint64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

json::object describe_file(const format::ManifestFile& file) {
  return {{"file", file.file}, {"bytes", file.bytes}, {"hash", to_hex(file.hash)}};
}

json::object describe_part(const format::ManifestPart& part, const format::PartImage& image) {
  json::array tensors;
  for (const format::PlacedTensor& tensor : image.tensors) {
    json::array shape;
    for (const std::uint64_t extent : tensor.spec.shape) shape.emplace_back(extent);
    tensors.push_back(json::object{{"name", tensor.spec.name},
                                   {"dtype", std::string(format::name(tensor.spec.dtype))},
                                   {"shape", std::move(shape)},
                                   {"offset", tensor.offset},
                                   {"bytes", tensor.bytes}});
  }
  return {{"file", part.file},
          {"bytes", part.bytes},
          {"root", to_hex(part.root)},
          {"extents", format::extent_count(part.bytes)},
          {"tensors", std::move(tensors)}};
}

void print_as_json(Tool& tool, const Chosen& chosen, const catalog::OpenCheckpoint& opened) {
  const format::Manifest& manifest = chosen.checkpoint.manifest;
  json::object document = describe(chosen.run, chosen.checkpoint);
  // The copy in `chosen` is not the one in the list.
  const auto is_same = [&](const catalog::Checkpoint* other) {
    return other != nullptr && other->manifest.sequence == manifest.sequence;
  };
  document["newest"] = is_same(chosen.run.newest());
  document["best"] = is_same(chosen.run.best());
  document["run_id"] = manifest.run_id;
  document["previous_sequence"] =
      manifest.previous_sequence ? json::value(*manifest.previous_sequence) : json::value(nullptr);
  document["world_size"] = manifest.world_size;
  document["stillframe_version"] = manifest.stillframe_version;
  document["framework"] = manifest.framework;
  document["python_version"] = manifest.python_version;
  document["has_pickle"] = manifest.has_pickle;
  json::array parts;
  for (std::size_t i = 0; i < manifest.parts.size(); ++i) {
    parts.push_back(describe_part(manifest.parts[i], opened.parts()[i].image));
  }
  document["parts"] = std::move(parts);
  document["sums"] = describe_file(manifest.sums);
  json::array states;
  for (const auto& state : manifest.states) states.push_back(describe_file(state));
  document["states"] = std::move(states);
  print_json(tool, document);
}

void print_as_text(Tool& tool, const Chosen& chosen, const catalog::OpenCheckpoint& opened) {
  const format::Manifest& manifest = chosen.checkpoint.manifest;
  tool.print("{}\n", chosen.checkpoint.path);
  tool.print(
      "sequence  {}{}\n", manifest.sequence,
      manifest.previous_sequence ? concat(" (after ", *manifest.previous_sequence, ")") : "");
  tool.print("step      {}\n", manifest.step);
  tool.print("written   {} ({} ago)\n", human_time(manifest.wall_ns),
             human_age(tool.clock().wall_ns() - manifest.wall_ns));
  tool.print("size      {} in {} parts\n", human_bytes(chosen.checkpoint.bytes()),
             manifest.parts.size());
  if (!manifest.metrics.empty()) tool.print("metrics   {}\n", human_metrics(manifest.metrics));
  if (!chosen.checkpoint.tags.empty()) {
    tool.print("tags      {}\n", joined(chosen.checkpoint.tags, " "));
  }
  tool.print("made by   Stillframe {}{}{}\n", manifest.stillframe_version,
             manifest.framework.empty() ? "" : concat(", ", manifest.framework),
             manifest.python_version.empty() ? "" : concat(", Python ", manifest.python_version));
  if (manifest.has_pickle) {
    tool.print("pickle    yes: state.json holds pickled values; load it only if you trust it\n");
  }
  for (std::size_t i = 0; i < manifest.parts.size(); ++i) {
    const format::ManifestPart& part = manifest.parts[i];
    const format::PartImage& image = opened.parts()[i].image;
    tool.print("\n{}  {}  {} tensors  root {}\n", part.file, human_bytes(part.bytes),
               image.tensors.size(), to_hex(part.root));
    std::vector<std::vector<std::string>> rows;
    for (const format::PlacedTensor& tensor : image.tensors) {
      rows.push_back({"", tensor.spec.name, std::string(format::name(tensor.spec.dtype)),
                      shape_text(tensor.spec.shape), human_bytes(tensor.bytes)});
    }
    tool.write(table(rows, "<<<<>"));
  }
  tool.write("\n");
  for (const format::ManifestFile& state : manifest.states) {
    tool.print("{}  {}  hash {}\n", state.file, human_bytes(state.bytes), to_hex(state.hash));
  }
}

}  // namespace

Result<Exit> show(Tool& tool, const std::string& text) {
  auto chosen = open_checkpoint(tool, text);
  if (!chosen) return std::move(chosen).error();
  auto io = tool.io();
  if (!io) return std::move(io).error();
  auto opened = catalog::OpenCheckpoint::open(**io, chosen->checkpoint);
  if (!opened) return std::move(opened).error();
  if (tool.options().as_json) {
    print_as_json(tool, *chosen, *opened);
  } else {
    print_as_text(tool, *chosen, *opened);
  }
  return Exit::kDone;
}

}  // namespace stillframe::cli
