#include "format/tensor.h"

#include <gtest/gtest.h>

#include <array>

namespace stillframe::format {
namespace {

struct DtypeRow {
  std::uint8_t number;
  const char* name;
  std::uint64_t bytes;
};

// The wire numbers and names as docs/FORMAT.md section 2 lists them. They never change.
constexpr std::array<DtypeRow, 19> kRows = {{
    {0, "BOOL", 1},    {1, "U8", 1},          {2, "I8", 1},          {3, "F8_E4M3", 1},
    {4, "F8_E5M2", 1}, {5, "F8_E4M3FNUZ", 1}, {6, "F8_E5M2FNUZ", 1}, {7, "F8_E8M0", 1},
    {8, "I16", 2},     {9, "U16", 2},         {10, "F16", 2},        {11, "BF16", 2},
    {12, "I32", 4},    {13, "U32", 4},        {14, "F32", 4},        {15, "I64", 8},
    {16, "U64", 8},    {17, "F64", 8},        {18, "C64", 8},
}};

TEST(Dtype, every_wire_number_has_its_name_and_size_for_ever) {
  for (const DtypeRow& row : kRows) {
    const auto dtype = dtype_from_number(row.number);
    ASSERT_TRUE(dtype) << row.name;
    EXPECT_EQ(static_cast<std::uint8_t>(*dtype), row.number);
    EXPECT_EQ(name(*dtype), row.name);
    EXPECT_EQ(element_bytes(*dtype), row.bytes);
    EXPECT_EQ(parse_dtype(row.name), dtype);
  }
}

TEST(Dtype, numbers_and_names_outside_the_table_are_nothing) {
  for (unsigned number = kRows.size(); number < 256; ++number) {
    EXPECT_FALSE(dtype_from_number(static_cast<std::uint8_t>(number))) << number;
  }
  for (const char* text : {"", "f32", "F32 ", "F4", "F6_E2M3", "C128", "BF1", "BF16X"}) {
    EXPECT_FALSE(parse_dtype(text)) << text;
  }
}

std::uint64_t Bytes(Dtype dtype, std::vector<std::uint64_t> shape) {
  const auto bytes = tensor_bytes({.name = "t", .dtype = dtype, .shape = std::move(shape)});
  return bytes ? *bytes : ~std::uint64_t{0};
}

TEST(TensorBytes, are_the_product_of_shape_and_element_size) {
  EXPECT_EQ(Bytes(Dtype::kF32, {2, 3}), 24U);
  EXPECT_EQ(Bytes(Dtype::kBF16, {7}), 14U);
  EXPECT_EQ(Bytes(Dtype::kI64, {}), 8U) << "a 0-d tensor has one element";
  EXPECT_EQ(Bytes(Dtype::kF64, {4, 0, 9}), 0U);
  EXPECT_EQ(Bytes(Dtype::kU8, {std::uint64_t{1} << 32U, (std::uint64_t{1} << 32U) - 1}),
            (~std::uint64_t{0} >> 32U) << 32U);
}

TEST(TensorBytes, beyond_64_bits_are_refused_wherever_a_zero_stands) {
  constexpr std::uint64_t kHuge = std::uint64_t{1} << 40U;
  for (const std::vector<std::uint64_t>& shape : std::vector<std::vector<std::uint64_t>>{
           {kHuge, kHuge}, {kHuge, kHuge, 0}, {0, kHuge, kHuge}, {~std::uint64_t{0}}}) {
    const auto bytes = tensor_bytes({.name = "w", .dtype = Dtype::kF32, .shape = shape});
    ASSERT_FALSE(bytes);
    EXPECT_EQ(bytes.error().code(), Code::kInvalidArgument);
    EXPECT_NE(bytes.error().message().find("\"w\""), std::string_view::npos);
  }
}

}  // namespace
}  // namespace stillframe::format
