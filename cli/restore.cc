#include <string>

#include "catalog/block_reader.h"
#include "cli/commands.h"
#include "cli/json.h"
#include "cli/run_access.h"
#include "cli/text.h"

namespace stillframe::cli {

Result<Exit> restore(Tool& tool, const std::string& address, const std::string& target) {
  auto chosen = open_checkpoint(tool, address);
  if (!chosen) return std::move(chosen).error();
  auto io = tool.io();
  if (!io) return std::move(io).error();
  auto staging = tool.staging();
  if (!staging) return std::move(staging).error();
  auto copied = catalog::copy_out(**io, chosen->checkpoint, target, *staging);
  if (!copied) return std::move(copied).error();

  if (tool.options().as_json) {
    print_json(tool, boost::json::object{{"sequence", chosen->checkpoint.manifest.sequence},
                                         {"step", chosen->checkpoint.manifest.step},
                                         {"source", chosen->checkpoint.path},
                                         {"target", target},
                                         {"bytes", chosen->checkpoint.bytes()}});
  } else {
    tool.print("{} -> {}  {}, every hash checked\n", chosen->checkpoint.path, target,
               human_bytes(chosen->checkpoint.bytes()));
  }
  return Exit::kDone;
}

}  // namespace stillframe::cli
