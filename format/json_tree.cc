#include "format/json_tree.h"

#include <algorithm>

#include "base/text.h"
#include "format/json.h"
#include "format/utf8.h"

namespace stillframe::format {

namespace {

using Kind = JsonValue::Kind;

class TreeBuilder final : public JsonEvents {
 public:
  JsonValue root;

  bool on_object_begin() override { return open(Kind::kObject); }
  bool on_array_begin() override { return open(Kind::kArray); }
  bool on_array_end() override { return close(); }
  bool on_object_end() override {
    if (const std::string* twice = find_twice(open_.back()->keys)) {
      return refuse(concat("key ", printable(*twice), " occurs twice"));
    }
    return close();
  }
  bool on_key(std::string_view key) override {
    open_.back()->keys.emplace_back(key);
    return accept();
  }
  bool on_string(std::string_view text) override {
    JsonValue& value = add(Kind::kString);
    value.text = text;
    return accept();
  }
  bool on_number(std::string_view text) override {
    JsonValue& value = add(Kind::kNumber);
    value.text = text;
    return accept();
  }
  bool on_bool(bool boolean) override {
    add(Kind::kBool).boolean = boolean;
    return accept();
  }
  bool on_null() override {
    add(Kind::kNull);
    return accept();
  }

 private:
  static const std::string* find_twice(const std::vector<std::string>& keys) {
    std::vector<const std::string*> order;
    order.reserve(keys.size());
    for (const std::string& key : keys) order.push_back(&key);
    std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) { return *a < *b; });
    const auto twice = std::adjacent_find(order.begin(), order.end(),
                                          [](const auto* a, const auto* b) { return *a == *b; });
    return twice == order.end() ? nullptr : *twice;
  }

  // The root, or the next item; an object's has its key already.
  JsonValue& add(Kind kind) {
    JsonValue& value = open_.empty() ? root : open_.back()->items.emplace_back();
    value.kind = kind;
    return value;
  }

  bool open(Kind kind) {
    open_.push_back(&add(kind));
    return accept();
  }

  bool close() {
    open_.pop_back();
    return accept();
  }

  // Pointers stay good: a parent grows only after its open child is closed.
  std::vector<JsonValue*> open_;
};

}  // namespace

Result<JsonValue> read_json_tree(std::string_view text, std::size_t depth_max) {
  TreeBuilder builder;
  if (Status read = read_json(text, depth_max, builder); !read) return std::move(read).error();
  return std::move(builder.root);
}

}  // namespace stillframe::format
