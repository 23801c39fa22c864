# Other people's libraries, each behind one target, by their Debian 12 names. All are header-only or
# static here, so that the binaries in the wheel need only libc, libstdc++ and libm.

find_path(XXHASH_INCLUDE xxhash.h REQUIRED)
add_library(stillframe_xxhash INTERFACE)  # XXH_INLINE_ALL: nothing to link.
target_include_directories(stillframe_xxhash SYSTEM INTERFACE ${XXHASH_INCLUDE})

find_path(URING_INCLUDE liburing.h REQUIRED)
find_library(URING_LIBRARY liburing.a REQUIRED)
add_library(stillframe_uring_library INTERFACE)
target_include_directories(stillframe_uring_library SYSTEM INTERFACE ${URING_INCLUDE})
target_link_libraries(stillframe_uring_library INTERFACE ${URING_LIBRARY})

# 1.81 by name: Debian 12 also has 1.74. JSON is compiled by us (boost/json/src.hpp), Asio is headers.
find_package(Boost 1.81 REQUIRED)
add_library(stillframe_boost INTERFACE)
target_include_directories(stillframe_boost SYSTEM INTERFACE ${Boost_INCLUDE_DIRS})
target_compile_definitions(stillframe_boost INTERFACE
  BOOST_ASIO_NO_DEPRECATED BOOST_ASIO_DISABLE_VISIBILITY)

find_program(FLATC flatc REQUIRED)
find_path(FLATBUFFERS_INCLUDE flatbuffers/flatbuffers.h REQUIRED)
add_library(stillframe_flatbuffers INTERFACE)
target_include_directories(stillframe_flatbuffers SYSTEM INTERFACE ${FLATBUFFERS_INCLUDE})

find_path(SPDLOG_INCLUDE spdlog/spdlog.h REQUIRED)
add_library(stillframe_spdlog INTERFACE)
target_include_directories(stillframe_spdlog SYSTEM INTERFACE ${SPDLOG_INCLUDE})
target_compile_definitions(stillframe_spdlog INTERFACE
  SPDLOG_FMT_EXTERNAL FMT_HEADER_ONLY=1 SPDLOG_NO_EXCEPTIONS)

find_path(CLI11_INCLUDE CLI/CLI.hpp REQUIRED)
add_library(stillframe_cli11 INTERFACE)
target_include_directories(stillframe_cli11 SYSTEM INTERFACE ${CLI11_INCLUDE})

if(STILLFRAME_TESTS)
  find_package(GTest REQUIRED)
  include(GoogleTest)
  enable_testing()
endif()
