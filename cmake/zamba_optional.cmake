# SPDX-License-Identifier: MIT
# What is used where the compiling machine has it: OpenMP by `zamba`, the CUDA toolkit by `cuda`.

# Included by our own CMakeLists.txt and by the installed package, each with its own target names.
macro(zamba_link_optional zamba cuda)
  if(NOT DEFINED ZAMBA_OPENMP OR ZAMBA_OPENMP)
    find_package(OpenMP QUIET COMPONENTS CXX)
  endif()
  if((NOT DEFINED ZAMBA_OPENMP OR ZAMBA_OPENMP) AND TARGET OpenMP::OpenMP_CXX)
    target_link_libraries(${zamba} INTERFACE $<BUILD_INTERFACE:OpenMP::OpenMP_CXX>)
    # Host code in a .cu file must agree with .cpp files about OpenMP: both instantiate the same templates.
    target_compile_options(${cuda} INTERFACE $<BUILD_INTERFACE:$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-fopenmp>>)
  endif()

  find_package(CUDAToolkit QUIET)
  if(TARGET CUDA::cublas)
    target_link_libraries(${cuda} INTERFACE $<BUILD_INTERFACE:CUDA::cudart> $<BUILD_INTERFACE:CUDA::cublas>)
  endif()
endmacro()
