#pragma once

#include <string>
#include <string_view>

#include "base/result.h"
#include "format/names.h"

namespace stillframe::cli {

// A RUN or CHECKPOINT argument, understood.
struct Address {
  std::string run_path;
  format::Selector selector;
  bool is_run_alone = false;  // Nothing was selected; `selector` is latest.
};
// kInvalidArgument: `text` is neither. Looks at the disk where a run may itself be called "best".
Result<Address> read_address(std::string_view text);

}  // namespace stillframe::cli
