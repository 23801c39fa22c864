#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "base/result.h"
#include "catalog/block_reader.h"
#include "uring/io_backend.h"

namespace stillframe::cli {

// The config.json that goes with a model.
struct ModelConfig {
  std::optional<std::string> json;
  std::string note;  // Why there is none.
};

// From the file of that name in the checkpoint's directory, else from `config` of the extra that
// the checkpoint was saved with (a dictionary, or a text that is one). kDataLoss: state.json is
// damaged.
Result<ModelConfig> find_model_config(uring::IoBackend& io, const catalog::OpenCheckpoint& opened);

// state.json of a checkpoint that was made of files with this config.json: back from there by
// find_model_config(). nullopt: the text cannot be kept so.
std::optional<std::string> state_with_config(std::string_view config_json);

}  // namespace stillframe::cli
