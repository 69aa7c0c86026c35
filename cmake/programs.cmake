# SPDX-License-Identifier: MIT
# What our own tests, benchmarks and examples are compiled with. Nothing here reaches a user of zamba::zamba.
include_guard(GLOBAL)

get_property(multi_config GLOBAL PROPERTY GENERATOR_IS_MULTI_CONFIG)
if(PROJECT_IS_TOP_LEVEL AND NOT multi_config AND NOT CMAKE_BUILD_TYPE)
  message(STATUS "zamba: no build type was given, so this is a Release build")
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Debug, Release, RelWithDebInfo or MinSizeRel" FORCE)
endif()
set(CMAKE_CXX_EXTENSIONS OFF)

if(EXISTS /proc/cpuinfo)
  file(STRINGS /proc/cpuinfo cpu_features REGEX "^flags" LIMIT_COUNT 1)
endif()

# ccache is kept apart by processor, because it takes -march=native to mean the same everywhere.
find_program(ZAMBA_CCACHE ccache)
if(PROJECT_IS_TOP_LEVEL AND ZAMBA_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  cmake_host_system_information(RESULT processor QUERY PROCESSOR_DESCRIPTION)
  string(MD5 processor "${processor}${cpu_features}")
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_NAMESPACE=${processor}
                                  CCACHE_BASEDIR=${PROJECT_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${ZAMBA_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
endif()

# Sanitizers instrument every register of AVX-512 code, which doubles the time to compile; AVX2 does for them.
set(processor_flag -march=native)
if(CMAKE_CXX_FLAGS MATCHES "-fsanitize=" AND cpu_features MATCHES " avx2 ")
  set(processor_flag -march=x86-64-v3)
endif()

# g++ 12 warns about its own AVX-512 intrinsics, whose undefined registers are meant to be so.
set(gcc12_warnings "")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  set(gcc12_warnings -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
string(REPLACE ";" "," gcc12_cuda_warnings "${gcc12_warnings}")

set(gcc12_constants OFF)
if(CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13 AND CMAKE_CXX_COMPILER_VERSION VERSION_GREATER_EQUAL 12
   AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(gcc12_constants ON)
endif()

add_library(zamba_own_flags INTERFACE)
target_link_libraries(zamba_own_flags INTERFACE zamba::zamba)
target_compile_options(
  zamba_own_flags
  INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>
            $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${ZAMBA_WERROR}>>:-Werror>
            $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${ZAMBA_NATIVE}>>:${processor_flag}>
            "$<$<COMPILE_LANGUAGE:CXX>:${gcc12_warnings}>"
            # g++ 12 with AVX-512 fills some 32-byte constants wrongly when it copies them (docs/gcc12_constants.cpp).
            $<$<AND:$<COMPILE_LANG_AND_ID:CXX,GNU>,$<BOOL:${gcc12_constants}>>:-mmove-max=128;-mstore-max=128>
            $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>
            $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${gcc12_warnings}>>:-Xcompiler=${gcc12_cuda_warnings}>
            $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${gcc12_constants}>>:-Xcompiler=-mmove-max=128,-mstore-max=128>
            $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${ZAMBA_NATIVE}>>:-Xcompiler=${processor_flag}>)

# CUDA is enabled only where nvcc is and there is something for it to compile.
file(GLOB_RECURSE cuda_files CONFIGURE_DEPENDS apps/*.cu tests/*.cu bench/*.cu examples/*.cu include/*.cuh)
find_program(ZAMBA_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME /usr/local/cuda PATH_SUFFIXES bin)
if(ZAMBA_CUDA AND cuda_files AND ZAMBA_NVCC AND TARGET CUDA::cublas)
  set(CMAKE_CUDA_ARCHITECTURES ${ZAMBA_CUDA_ARCHITECTURES})
  if(NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER ${ZAMBA_NVCC})
  endif()
  enable_language(CUDA)
  set(ZAMBA_CUDA_ENABLED ON)
elseif(ZAMBA_CUDA AND cuda_files)
  message(STATUS "zamba: no CUDA toolkit was found, so the programs compute on the CPU, and CUDA tests and benchmarks are left out")
endif()

# zamba_add_program(<target> <sources>...): an executable of ours.
function(zamba_add_program target)
  add_executable(${target} ${ARGN})
  target_link_libraries(${target} PRIVATE zamba_own_flags)
endfunction()

# zamba_add_cuda_program(<target> <sources>...): the same, of .cu and .cpp files together.
function(zamba_add_cuda_program target)
  zamba_add_program(${target} ${ARGN})
  target_link_libraries(${target} PRIVATE zamba::cuda)
endfunction()

# zamba_leave_at_ptx(<target>): where it is not to run, no machine code is made of its kernels; those of the operators'
# tests are the same, and are assembled.
function(zamba_leave_at_ptx target)
  if(ZAMBA_CUDA_COMPILE_ONLY)
    list(TRANSFORM CMAKE_CUDA_ARCHITECTURES APPEND -virtual OUTPUT_VARIABLE virtual)
    set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${virtual}")
  endif()
endfunction()

# zamba_in_units(<variable> <unit> <count> <sources>...): lists <unit>_1.cpp and so on, into which the sources, .cpp or
# .cu, are dealt: what they have in common is parsed once. As names in sources may be the same, each has a namespace of
# its own there; headers come before, and its macros end with it. A source that another includes belongs to that one.
function(zamba_in_units variable unit count)
  list(GET ARGN 0 first)
  get_filename_component(extension ${first} LAST_EXT)
  foreach(number RANGE 1 ${count})
    set(includes_${number} "")
    set(sources_${number} "")
  endforeach()
  set(number 0)
  foreach(source IN LISTS ARGN)
    math(EXPR number "${number} % ${count} + 1")
    set(files ${source})
    set(begin "")
    set(end "")
    while(files)
      list(POP_FRONT files file)
      set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
      get_filename_component(folder ${file} DIRECTORY)
      file(STRINGS ${file} lines REGEX "^#(define [A-Za-z_]|include [<\"])")
      foreach(line IN LISTS lines)
        string(REGEX MATCH "^#([a-z]+) [<\"]?([A-Za-z0-9_./]+)" line "${line}")
        set(what ${CMAKE_MATCH_2})
        if(CMAKE_MATCH_1 STREQUAL "define")
          string(APPEND begin "#pragma push_macro(\"${what}\")\n#undef ${what}\n")
          string(APPEND end "#pragma pop_macro(\"${what}\")\n")
        elseif(what MATCHES "\\.(cpp|cu)$")
          list(APPEND files ${folder}/${what})
        elseif(line MATCHES "\"" AND EXISTS ${folder}/${what})
          string(APPEND includes_${number} "#include \"${folder}/${what}\"\n")
        else()
          string(APPEND includes_${number} "#include <${what}>\n")
        endif()
      endforeach()
    endwhile()
    file(RELATIVE_PATH name ${PROJECT_SOURCE_DIR} ${source})
    string(MAKE_C_IDENTIFIER ${name} name)
    string(APPEND sources_${number} "${begin}namespace ${name} {\n#include \"${source}\"\n}\n${end}")
  endforeach()
  set(units)
  foreach(number RANGE 1 ${count})
    set(file ${CMAKE_CURRENT_BINARY_DIR}/${unit}_${number}${extension})
    file(CONFIGURE OUTPUT ${file} CONTENT "${includes_${number}}${sources_${number}}" @ONLY)
    list(APPEND units ${file})
  endforeach()
  set(${variable} ${units} PARENT_SCOPE)
endfunction()
