#include "cli/address.h"

#include <filesystem>
#include <system_error>
#include <utility>

namespace stillframe::cli {

namespace {

// A directory that is itself a run or a checkpoint keeps its name, whatever that would mean inside
// of a run; a link never does.
bool stands_alone(const std::filesystem::path& path) {
  std::error_code failed;
  const auto kind = std::filesystem::symlink_status(path, failed).type();
  const std::string name = path.filename().string();
  const bool could_be_selector =
      name == "latest" || name == "best" || name.find('@') != std::string::npos;
  return could_be_selector && kind == std::filesystem::file_type::directory &&
         (std::filesystem::exists(path / format::kManifestName, failed) ||
          std::filesystem::exists(path / format::kPrivateDirectory, failed));
}

}  // namespace

Result<Address> read_address(std::string_view text) {
  while (text.size() > 1 && text.ends_with('/')) text.remove_suffix(1);
  if (stands_alone(text)) {
    return Address{.run_path = std::string(text), .selector = {}, .is_run_alone = true};
  }
  auto parsed = format::parse_address(text);
  if (!parsed) return std::move(parsed).error();
  const bool is_run_alone = parsed->run_path == text;
  return Address{.run_path = std::move(parsed->run_path),
                 .selector = std::move(parsed->selector),
                 .is_run_alone = is_run_alone};
}

}  // namespace stillframe::cli
