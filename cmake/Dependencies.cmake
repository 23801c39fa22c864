# Other people's libraries, each behind one target, by their Debian 12 names. All are header-only or
# static here, so that the binaries in the wheel need only libc, libstdc++ and libm.

# stillframe_compiled_library(NAME SOURCE): one that Debian has as headers and as a shared library
# only. It is compiled once here, not in every file that includes it.
function(stillframe_compiled_library name source)
  add_library(${name} STATIC EXCLUDE_FROM_ALL ${PROJECT_SOURCE_DIR}/third_party/${source})
  target_link_libraries(${name} PUBLIC stillframe_build)
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
endfunction()

find_path(XXHASH_INCLUDE xxhash.h REQUIRED)
add_library(stillframe_xxhash INTERFACE)  # XXH_INLINE_ALL: nothing to link.
target_include_directories(stillframe_xxhash SYSTEM INTERFACE ${XXHASH_INCLUDE})

find_path(URING_INCLUDE liburing.h REQUIRED)
find_library(URING_LIBRARY liburing.a REQUIRED)
add_library(stillframe_uring_library INTERFACE)
target_include_directories(stillframe_uring_library SYSTEM INTERFACE ${URING_INCLUDE})
target_link_libraries(stillframe_uring_library INTERFACE ${URING_LIBRARY})

# 1.81 by name: Debian 12 also has 1.74.
find_package(Boost 1.81 REQUIRED)
add_library(stillframe_boost INTERFACE)
target_include_directories(stillframe_boost SYSTEM INTERFACE ${Boost_INCLUDE_DIRS})
stillframe_compiled_library(stillframe_boost_json boost_json.cc)
target_link_libraries(stillframe_boost_json PUBLIC stillframe_boost)
stillframe_compiled_library(stillframe_asio asio.cc)
target_link_libraries(stillframe_asio PUBLIC stillframe_boost)
target_compile_definitions(stillframe_asio PUBLIC
  BOOST_ASIO_SEPARATE_COMPILATION BOOST_ASIO_NO_DEPRECATED BOOST_ASIO_DISABLE_VISIBILITY)

find_program(FLATC flatc REQUIRED)
find_path(FLATBUFFERS_INCLUDE flatbuffers/flatbuffers.h REQUIRED)
add_library(stillframe_flatbuffers INTERFACE)
target_include_directories(stillframe_flatbuffers SYSTEM INTERFACE ${FLATBUFFERS_INCLUDE})

find_path(FMT_INCLUDE fmt/format.h REQUIRED)
stillframe_compiled_library(stillframe_fmt fmt.cc)
target_include_directories(stillframe_fmt SYSTEM PUBLIC ${FMT_INCLUDE})

find_path(SPDLOG_INCLUDE spdlog/spdlog.h REQUIRED)
stillframe_compiled_library(stillframe_spdlog spdlog.cc)
target_link_libraries(stillframe_spdlog PUBLIC stillframe_fmt)
target_include_directories(stillframe_spdlog SYSTEM PUBLIC ${SPDLOG_INCLUDE})
target_compile_definitions(stillframe_spdlog PUBLIC
  SPDLOG_FMT_EXTERNAL SPDLOG_COMPILED_LIB SPDLOG_NO_EXCEPTIONS)

find_path(CLI11_INCLUDE CLI/CLI.hpp REQUIRED)
add_library(stillframe_cli11 INTERFACE)
target_include_directories(stillframe_cli11 SYSTEM INTERFACE ${CLI11_INCLUDE})

if(STILLFRAME_TESTS)
  find_package(GTest REQUIRED)
  include(GoogleTest)
  enable_testing()
endif()
