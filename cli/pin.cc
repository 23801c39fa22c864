// pin and unpin: tags that protect a checkpoint from retention.
#include <algorithm>
#include <string>
#include <vector>

#include "base/text.h"
#include "cli/address.h"
#include "cli/commands.h"
#include "cli/json.h"
#include "cli/run_access.h"
#include "cli/text.h"

namespace stillframe::cli {

namespace {

// The tag of a pin that was given no name.
std::string pin_tag(std::uint64_t sequence) { return concat("pin-", sequence); }

void report(Tool& tool, const Chosen& chosen, const std::vector<std::string>& tags) {
  const std::uint64_t sequence = chosen.checkpoint.manifest.sequence;
  if (tool.options().as_json) {
    print_json(tool, boost::json::object{{"sequence", sequence},
                                         {"path", chosen.checkpoint.path},
                                         {"tags", strings_json(tags)}});
  } else if (tags.empty()) {
    tool.print("{} is no longer protected from retention\n", chosen.checkpoint.path);
  } else {
    tool.print("{} is protected from retention by {}\n", chosen.checkpoint.path,
               joined(tags, ", "));
  }
}

}  // namespace

Result<Exit> pin(Tool& tool, const std::string& text, std::string tag) {
  auto address = read_address(text);
  if (!address) return std::move(address).error();
  auto chosen = open_checkpoint(tool, text);
  if (!chosen) return std::move(chosen).error();
  if (tag.empty()) tag = pin_tag(chosen->checkpoint.manifest.sequence);
  auto set = put_tag(tool, address->run_path, tag, chosen->checkpoint.manifest.sequence);
  if (!set) return std::move(set).error();
  std::vector<std::string> tags = chosen->checkpoint.tags;
  if (std::find(tags.begin(), tags.end(), tag) == tags.end()) tags.push_back(tag);
  report(tool, *chosen, tags);
  return Exit::kDone;
}

Result<Exit> unpin(Tool& tool, const std::string& text, std::string tag) {
  auto address = read_address(text);
  if (!address) return std::move(address).error();
  auto chosen = open_checkpoint(tool, text);
  if (!chosen) return std::move(chosen).error();
  if (tag.empty() && address->selector.kind == format::Selector::Kind::kTag) {
    tag = address->selector.tag;
  }
  if (tag.empty()) tag = pin_tag(chosen->checkpoint.manifest.sequence);
  std::vector<std::string> tags = chosen->checkpoint.tags;
  const auto found = std::find(tags.begin(), tags.end(), tag);
  if (found == tags.end()) {
    return Error(Code::kNotFound, tags.empty()
                                      ? concat(chosen->checkpoint.path, " is not pinned")
                                      : concat(chosen->checkpoint.path, " has no tag ", tag,
                                               "; unpin --as one of: ", joined(tags, ", ")));
  }
  tags.erase(found);
  auto removed = put_tag(tool, address->run_path, tag, 0);
  if (!removed) return std::move(removed).error();
  report(tool, *chosen, tags);
  return Exit::kDone;
}

}  // namespace stillframe::cli
