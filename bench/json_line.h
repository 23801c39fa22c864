#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace stillframe::bench {

// One object of a result file, built member by member: JsonLine().add("a", 1).add("b", "c").text().
class JsonLine {
 public:
  JsonLine& add(std::string_view name, std::string_view value);
  JsonLine& add(std::string_view name, const char* value);
  JsonLine& add(std::string_view name, double value);
  JsonLine& add(std::string_view name, std::uint64_t value);
  JsonLine& add(std::string_view name, int value);
  JsonLine& add(std::string_view name, bool value);
  // `json` is a value already: an object, an array.
  JsonLine& add_json(std::string_view name, std::string_view json);

  std::string text() const { return "{" + members_ + "}"; }
  void print() const;  // To standard output, as a line of its own.

 private:
  std::string members_;
};

}  // namespace stillframe::bench
