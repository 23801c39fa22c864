#include "cli/tool.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "base/os_error.h"
#include "catalog/aligned_memory.h"
#include "catalog/block_reader.h"

namespace stillframe::cli {

Tool::Tool(Options options) : options_(std::move(options)) {
  const char* no_colour = std::getenv("NO_COLOR");
  has_colour_ = (no_colour == nullptr || *no_colour == '\0') && ::isatty(STDOUT_FILENO) == 1;
}

Result<uring::IoBackend*> Tool::io() {
  if (!io_) {
    auto created = uring::create_backend({});
    if (!created) return std::move(created).error();
    io_ = std::move(created->backend);
  }
  return io_.get();
}

Result<Bytes> Tool::staging() {
  if (!staging_) {
    auto memory = catalog::allocate_aligned(catalog::kReadBlockBytes * catalog::kReadDepth);
    if (!memory) return std::move(memory).error();
    staging_ = *std::move(memory);
  }
  return staging_.bytes();
}

void Tool::write(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) has_failed_output_ = true;
}

Status Tool::flush() {
  if (std::fflush(stdout) != 0 || has_failed_output_) {
    return os_error("write to standard output", errno);
  }
  return ok();
}

std::string Tool::painted(std::string_view text, std::string_view colour) const {
  if (!has_colour_ || options_.as_json) return std::string(text);
  return fmt::format("\x1b[{}m{}\x1b[0m", colour, text);
}

}  // namespace stillframe::cli
