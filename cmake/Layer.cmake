# stillframe_layer(NAME SOURCES ... [USES layer ...] [LINKS target ...])
#
# One folder, one static library, stillframe::NAME. USES says which layers it may include, as in
# docs/ARCHITECTURE.md and tests/lint/layering_test.py; LINKS names other people's libraries.
function(stillframe_layer name)
  cmake_parse_arguments(PARSE_ARGV 1 layer "" "" "SOURCES;USES;LINKS")
  list(TRANSFORM layer_USES PREPEND stillframe::)
  add_library(stillframe_${name} STATIC ${layer_SOURCES})
  add_library(stillframe::${name} ALIAS stillframe_${name})
  set_target_properties(stillframe_${name} PROPERTIES LINKER_LANGUAGE CXX) # May be headers alone.
  target_include_directories(stillframe_${name} PUBLIC ${PROJECT_SOURCE_DIR} ${PROJECT_BINARY_DIR})
  target_link_libraries(stillframe_${name}
    PUBLIC ${layer_USES} ${layer_LINKS} stillframe_build PRIVATE stillframe_warnings)
endfunction()

# stillframe_test(NAME SOURCES ... USES layer ...)
#
# One GoogleTest binary, tests/NAME, registered with ctest as one test per TEST().
function(stillframe_test name)
  cmake_parse_arguments(PARSE_ARGV 1 test "" "" "SOURCES;USES;LINKS")
  list(TRANSFORM test_USES PREPEND stillframe::)
  add_executable(${name} ${test_SOURCES})
  target_link_libraries(${name} PRIVATE ${test_USES} ${test_LINKS} stillframe_build stillframe_warnings
    GTest::gtest GTest::gtest_main)
  gtest_discover_tests(${name} DISCOVERY_TIMEOUT 60 PROPERTIES TIMEOUT 300)
endfunction()

# stillframe_fuzz(NAME SOURCES ... USES layer ...)
#
# One libFuzzer binary, fuzz_NAME, around stillframe::fuzz::NAME() of tests/fuzz/targets.h:
#   fuzz_NAME NEW_INPUTS tests/fuzz/corpus/NAME
function(stillframe_fuzz name)
  cmake_parse_arguments(PARSE_ARGV 1 fuzz "" "" "SOURCES;USES;LINKS")
  list(TRANSFORM fuzz_USES PREPEND stillframe::)
  add_executable(fuzz_${name} tests/fuzz/libfuzzer_main.cc ${fuzz_SOURCES})
  if(NOT TARGET every_fuzz_target)
    add_custom_target(every_fuzz_target)
  endif()
  add_dependencies(every_fuzz_target fuzz_${name})
  target_compile_definitions(fuzz_${name} PRIVATE FUZZ_TARGET=${name})
  target_link_options(fuzz_${name} PRIVATE -fsanitize=fuzzer)
  target_link_libraries(fuzz_${name}
    PRIVATE ${fuzz_USES} ${fuzz_LINKS} stillframe_build stillframe_warnings)
endfunction()
