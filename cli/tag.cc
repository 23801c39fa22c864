#include <algorithm>
#include <string>

#include "base/text.h"
#include "cli/address.h"
#include "cli/commands.h"
#include "cli/json.h"
#include "cli/run_access.h"

namespace stillframe::cli {

Result<Exit> tag(Tool& tool, const std::string& text, const std::string& name) {
  auto address = read_address(text);
  if (!address) return std::move(address).error();
  auto chosen = open_checkpoint(tool, text);
  if (!chosen) return std::move(chosen).error();
  const std::uint64_t sequence = chosen->checkpoint.manifest.sequence;

  boost::json::value moved_from = nullptr;
  for (const catalog::Checkpoint& other : chosen->run.checkpoints) {
    const bool has_it = std::find(other.tags.begin(), other.tags.end(), name) != other.tags.end();
    if (has_it && other.manifest.sequence != sequence) moved_from = other.manifest.sequence;
  }
  auto set = put_tag(tool, address->run_path, name, sequence);
  if (!set) return std::move(set).error();

  if (tool.options().as_json) {
    print_json(tool, boost::json::object{{"tag", name},
                                         {"sequence", sequence},
                                         {"path", chosen->checkpoint.path},
                                         {"moved_from", moved_from}});
  } else if (moved_from.is_null()) {
    tool.print("{} -> {}\n", name, chosen->checkpoint.path);
  } else {
    tool.print("{} -> {} (was {})\n", name, chosen->checkpoint.path, moved_from.as_uint64());
  }
  return Exit::kDone;
}

}  // namespace stillframe::cli
