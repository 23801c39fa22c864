# stillframe_build_id(VARIABLE): 12 hexadecimal digits over the sources, which stand in the name of the
# private daemon's socket: a client never talks to a daemon of another build. Taken when CMake
# configures; an incremental build keeps it.
function(stillframe_build_id variable)
  set(text "")
  foreach(folder base shm format uring catalog cuda kernels client daemon cli)
    file(GLOB files RELATIVE "${PROJECT_SOURCE_DIR}" "${PROJECT_SOURCE_DIR}/${folder}/*.h"
      "${PROJECT_SOURCE_DIR}/${folder}/*.cc" "${PROJECT_SOURCE_DIR}/${folder}/*.fbs")
    list(SORT files)
    foreach(file IN LISTS files)
      file(SHA256 "${PROJECT_SOURCE_DIR}/${file}" digest)
      string(APPEND text "${file} ${digest}\n")
    endforeach()
  endforeach()
  string(SHA256 digest "${text}")
  string(SUBSTRING "${digest}" 0 12 digest)
  set(${variable} "${digest}" PARENT_SCOPE)
endfunction()
