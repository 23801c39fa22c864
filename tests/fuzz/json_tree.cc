#include "format/json_tree.h"

#include <string>

#include "base/check.h"
#include "format/json.h"
#include "tests/fuzz/targets.h"

namespace stillframe::fuzz {

using format::JsonValue;

namespace {

constexpr std::size_t kDepthMax = 16;

void append(std::string& text, const JsonValue& value, std::size_t depth) {
  check(depth <= kDepthMax, "no deeper than asked");
  switch (value.kind) {
    case JsonValue::Kind::kNull: text += "null"; return;
    case JsonValue::Kind::kBool: text += value.boolean ? "true" : "false"; return;
    case JsonValue::Kind::kNumber: text += value.text; return;
    case JsonValue::Kind::kString: format::append_json_string(text, value.text); return;
    case JsonValue::Kind::kArray:
    case JsonValue::Kind::kObject: break;
  }
  const bool is_object = value.kind == JsonValue::Kind::kObject;
  check(value.keys.size() == (is_object ? value.items.size() : 0), "one key an item");
  text += is_object ? '{' : '[';
  for (std::size_t i = 0; i < value.items.size(); ++i) {
    if (i != 0) text += ',';
    if (is_object) {
      format::append_json_string(text, value.keys[i]);
      text += ':';
    }
    append(text, value.items[i], depth + 1);
  }
  text += is_object ? '}' : ']';
}

bool is_same(const JsonValue& a, const JsonValue& b) {
  if (a.kind != b.kind || a.boolean != b.boolean || a.text != b.text || a.keys != b.keys ||
      a.items.size() != b.items.size()) {
    return false;
  }
  for (std::size_t i = 0; i < a.items.size(); ++i) {
    if (!is_same(a.items[i], b.items[i])) return false;
  }
  return true;
}

}  // namespace

bool json_tree(ConstBytes input) {
  const std::string_view text(reinterpret_cast<const char*>(input.data()), input.size());
  const auto tree = format::read_json_tree(text, kDepthMax);
  if (!tree) {
    check(tree.error().code() == Code::kDataLoss, "bad bytes are data loss");
    return false;
  }
  std::string written;
  append(written, *tree, 0);
  const auto again = format::read_json_tree(written, kDepthMax);
  check(again.has_value(), "what was read can be written and read");
  check(is_same(*tree, *again), "round trip");
  return true;
}

}  // namespace stillframe::fuzz
