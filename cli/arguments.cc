#include "cli/arguments.h"

#include "base/text.h"
#include "cli/address.h"
#include "cli/run_access.h"
#include "format/names.h"

namespace stillframe::cli {

namespace {

std::string check_run(const std::string& text) {
  auto address = read_address(text);
  if (!address) return std::string(address.error().message());
  if (address->is_run_alone) return {};
  return concat("takes a whole run, such as ", address->run_path, "; for one checkpoint: show");
}

std::string check_checkpoint(const std::string& text) {
  auto address = read_address(text);
  return address ? std::string() : std::string(address.error().message());
}

std::string check_exact_checkpoint(const std::string& text) {
  auto address = read_address(text);
  if (!address) return std::string(address.error().message());
  if (!address->is_run_alone) return {};
  return concat("say which: ", address->run_path, "@SEQUENCE; stillframe ls ", address->run_path,
                " lists them");
}

Argument add(CLI::App& command, const char* name, const char* help,
             std::string (*check)(const std::string&)) {
  auto argument = std::make_shared<std::string>();
  command.add_option(name, *argument, help)->required()->check(check);
  return argument;
}

}  // namespace

Argument add_run(CLI::App& command) {
  return add(command, "RUN", "Directory of the run", check_run);
}

Argument add_checkpoint(CLI::App& command) {
  return add(command, "CHECKPOINT", "Such as RUN@latest, RUN@best, RUN@12", check_checkpoint);
}

Argument add_exact_checkpoint(CLI::App& command) {
  return add(command, "CHECKPOINT", "RUN@12, a step that occurs once, a tag, or its directory",
             check_exact_checkpoint);
}

std::string check_tag_argument(const std::string& tag) {
  auto allowed = format::check_tag(tag);
  return allowed ? std::string() : std::string(allowed.error().message());
}

}  // namespace stillframe::cli
