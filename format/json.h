#pragma once

// JSON as the format needs it: strict, bounded, exact. Reading is a stream of events, so that a
// header with a million tensors never becomes a tree; numbers arrive as their text, so that
// integers are never rounded and the caller decides what a number may be.

#include <cstdint>
#include <string>
#include <string_view>

#include "base/result.h"

namespace stillframe::format {

// What a document holds, in order. Each event returns accept() to go on or refuse() to stop; the
// views live until the event returns. Duplicate keys arrive twice: refusing them is the handler's.
class JsonEvents {
 public:
  virtual ~JsonEvents() = default;
  virtual bool on_object_begin() = 0;
  virtual bool on_object_end() = 0;
  virtual bool on_array_begin() = 0;
  virtual bool on_array_end() = 0;
  virtual bool on_key(std::string_view key) = 0;
  virtual bool on_string(std::string_view text) = 0;
  virtual bool on_number(std::string_view text) = 0;  // As JSON's grammar has it: "-1.5e3".
  virtual bool on_bool(bool value) = 0;
  virtual bool on_null() = 0;

  const std::string& refusal() const noexcept { return refusal_; }

 protected:
  static bool accept() noexcept { return true; }
  bool refuse(std::string why) {
    refusal_ = std::move(why);
    return false;
  }

 private:
  std::string refusal_;
};

// Reads one document that fills `text`: well-formed UTF-8, nothing after it, no comments, no
// trailing commas, at most `depth_max` nested arrays and objects. kDataLoss with the refusal or the
// parser's reason and the position; what the events built by then is to be dropped.
Status read_json(std::string_view text, std::size_t depth_max, JsonEvents& events);

// Appends `text`, which is UTF-8, in quotes; only '"', '\' and U+0000 to U+001F are escaped, the
// latter as \u00xx. One text has one spelling.
void append_json_string(std::string& json, std::string_view text);

}  // namespace stillframe::format
