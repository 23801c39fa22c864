# The CUDA toolkit, of which only cuda.h is needed, and a .cu file for every GPU that we serve, as one
# fatbin: machine code for A100, H100 and B200 and their relatives, and PTX from which a driver makes
# that of any other since Turing. Without nvcc the rest builds all the same. Hardly any host code is
# compiled, so a host compiler newer than nvcc knows is no reason to stop.

# As NVIDIA's wheels on PyPI lay it out, where python/requirements-*.txt or a wheel's build put them.
# Theirs come first: pinned, so that what is tested is what is built.
file(GLOB cuda_hints ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/cu13)
foreach(prefix IN LISTS CMAKE_PREFIX_PATH)
  list(APPEND cuda_hints ${prefix}/nvidia/cu13)
endforeach()
list(APPEND cuda_hints $ENV{CUDA_HOME} $ENV{CUDA_PATH} /usr/local/cuda)

find_program(STILLFRAME_NVCC nvcc HINTS ${cuda_hints} PATH_SUFFIXES bin)
cmake_path(GET STILLFRAME_NVCC PARENT_PATH nvcc_folder)
find_path(CUDA_INCLUDE cuda.h HINTS ${cuda_hints} ${nvcc_folder}/.. PATH_SUFFIXES include)
if(NOT CUDA_INCLUDE)
  message(FATAL_ERROR "no cuda.h: python -m pip install -r python/requirements-run.txt, which "
    "brings it alone, or the CUDA toolkit")
endif()
add_library(stillframe_cuda_header INTERFACE)  # The library itself is found at run time.
target_include_directories(stillframe_cuda_header SYSTEM INTERFACE ${CUDA_INCLUDE})

# stillframe_gpu_kernels(SOURCE OUTPUT)
function(stillframe_gpu_kernels source output)
  add_custom_command(OUTPUT ${output}
    COMMAND ${STILLFRAME_NVCC} -std=c++20 -fatbin -O3 --expt-relaxed-constexpr
      -Werror all-warnings -allow-unsupported-compiler -I${PROJECT_SOURCE_DIR}
      -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90
      -gencode arch=compute_100,code=sm_100 -gencode arch=compute_75,code=compute_75
      -MD -MF ${output}.d -o ${output} ${PROJECT_SOURCE_DIR}/${source}
    DEPENDS ${PROJECT_SOURCE_DIR}/${source}
    DEPFILE ${output}.d
    COMMENT "nvcc ${source}" VERBATIM)
endfunction()
