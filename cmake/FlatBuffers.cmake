# stillframe_flatbuffers_header(SCHEMA OUTPUT): what flatc makes of SCHEMA, as a header that warnings
# do not look into: it is other people's style.
#
# This file is also the script that puts that one line in front (cmake -P), because neither flatc nor
# an include folder that also holds our own headers can say "system header".
if(CMAKE_SCRIPT_MODE_FILE)
  file(READ "${INPUT}" text)
  file(WRITE "${OUTPUT}" "#pragma GCC system_header\n${text}")
  return()
endif()

function(stillframe_flatbuffers_header schema output)
  get_filename_component(name "${schema}" NAME_WE)
  set(raw_folder "${CMAKE_CURRENT_BINARY_DIR}/flatc")
  # The object API: plain structs to fill in and to read, made and unmade at the socket.
  add_custom_command(OUTPUT "${output}"
    COMMAND ${FLATC} --cpp --cpp-std c++17 --scoped-enums --gen-object-api
      -o "${raw_folder}" "${PROJECT_SOURCE_DIR}/${schema}"
    COMMAND ${CMAKE_COMMAND} -DINPUT=${raw_folder}/${name}_generated.h -DOUTPUT=${output}
      -P "${PROJECT_SOURCE_DIR}/cmake/FlatBuffers.cmake"
    DEPENDS "${PROJECT_SOURCE_DIR}/${schema}" "${PROJECT_SOURCE_DIR}/cmake/FlatBuffers.cmake"
    COMMENT "flatc ${schema}" VERBATIM)
endfunction()
