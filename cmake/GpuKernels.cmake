# kernels/gpu_kernels.cu for every GPU that we serve, as one fatbin: machine code for A100, H100 and
# B200, and PTX from which a driver makes that of any other since Turing. Without nvcc the rest
# builds all the same.

find_program(STILLFRAME_NVCC nvcc)

function(stillframe_gpu_kernels output)
  add_custom_command(OUTPUT ${output}
    COMMAND ${STILLFRAME_NVCC} -std=c++20 -fatbin -O3 --expt-relaxed-constexpr
      -Werror all-warnings -I${PROJECT_SOURCE_DIR}
      -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90
      -gencode arch=compute_100,code=sm_100 -gencode arch=compute_75,code=compute_75
      -MD -MF ${output}.d -o ${output} ${PROJECT_SOURCE_DIR}/kernels/gpu_kernels.cu
    DEPENDS ${PROJECT_SOURCE_DIR}/kernels/gpu_kernels.cu
    DEPFILE ${output}.d
    COMMENT "nvcc kernels/gpu_kernels.cu" VERBATIM)
  add_custom_target(gpu_kernels ALL DEPENDS ${output})
endfunction()
