#include "bench/json_line.h"

#include <cstdio>

namespace stillframe::bench {

namespace {

std::string quoted(std::string_view text) {
  std::string json = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') json += '\\';
    json += static_cast<unsigned char>(letter) < 0x20 ? ' ' : letter;
  }
  return json + '"';
}

}  // namespace

JsonLine& JsonLine::add_json(std::string_view name, std::string_view json) {
  if (!members_.empty()) members_ += ", ";
  members_ += quoted(name);
  members_ += ": ";
  members_ += json;
  return *this;
}

JsonLine& JsonLine::add(std::string_view name, std::string_view value) {
  return add_json(name, quoted(value));
}

JsonLine& JsonLine::add(std::string_view name, const char* value) {
  return add(name, std::string_view(value));
}

JsonLine& JsonLine::add(std::string_view name, double value) {
  char digits[32];
  (void)std::snprintf(digits, sizeof digits, "%.6g", value);
  return add_json(name, digits);
}

JsonLine& JsonLine::add(std::string_view name, std::uint64_t value) {
  return add_json(name, std::to_string(value));
}

JsonLine& JsonLine::add(std::string_view name, int value) {
  return add_json(name, std::to_string(value));
}

JsonLine& JsonLine::add(std::string_view name, bool value) {
  return add_json(name, value ? "true" : "false");
}

void JsonLine::print() const {
  std::printf("%s\n", text().c_str());
  (void)std::fflush(stdout);
}

}  // namespace stillframe::bench
