#include <string>

#include "catalog/block_reader.h"
#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/json.h"
#include "cli/run_access.h"
#include "cli/text.h"

namespace stillframe::cli {

namespace {

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

}  // namespace

void declare_restore(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "restore", "Copy a checkpoint out to a new directory, checking every hash on the way");
  const Argument address = add_checkpoint(*command);
  auto target = std::make_shared<std::string>();
  command->add_option("DIR", *target, "The directory to make; it must not exist")->required();
  command->callback([&action, address, target] {
    action = [address, target](Tool& tool) { return restore(tool, *address, *target); };
  });
}

}  // namespace stillframe::cli
