# How everything of ours is compiled: one interface target for flags that must agree everywhere, one
# for the warnings that we hold ourselves to and a user of our headers need not.

add_library(stillframe_build INTERFACE)
find_package(Threads REQUIRED)
target_link_libraries(stillframe_build INTERFACE Threads::Threads)
target_compile_options(stillframe_build INTERFACE -fno-omit-frame-pointer)
target_compile_definitions(stillframe_build INTERFACE STILLFRAME_VERSION="${PROJECT_VERSION}")
if(STILLFRAME_FAULTS)
  target_compile_definitions(stillframe_build INTERFACE STILLFRAME_FAULTS)
endif()
if(STILLFRAME_SANITIZE)
  target_compile_options(stillframe_build INTERFACE -fsanitize=${STILLFRAME_SANITIZE}
    -fno-sanitize-recover=all)
  target_link_options(stillframe_build INTERFACE -fsanitize=${STILLFRAME_SANITIZE})
endif()

add_library(stillframe_warnings INTERFACE)
target_compile_options(stillframe_warnings INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wold-style-cast
  -Wnon-virtual-dtor -Woverloaded-virtual -Wimplicit-fallthrough -Werror)
# GCC 12 reports these falsely in coroutines and in inlined std::string and std::variant code.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  target_compile_options(stillframe_warnings INTERFACE
    -Wno-maybe-uninitialized -Wno-restrict -Wno-mismatched-new-delete -Wno-stringop-overflow
    -Wno-array-bounds)
  if(STILLFRAME_SANITIZE MATCHES "thread")
    target_compile_options(stillframe_warnings INTERFACE -Wno-tsan)  # Asio's fences.
  endif()
endif()

find_program(CCACHE ccache)
if(CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE})
endif()
