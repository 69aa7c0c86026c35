# SPDX-License-Identifier: MIT
# cmake -P mirror.cmake <root>: fails, naming what is missing, unless every operator has a test and a benchmark, every
# block a test, and an operator with kernels its CPU version and both of these on CUDA.
set(root ${CMAKE_ARGV3})
set(missing)

function(expect file reason)
  if(NOT EXISTS ${root}/${file})
    set(missing "${missing}\n  ${file} is missing: ${reason}" PARENT_SCOPE)
  endif()
endfunction()

file(GLOB blocks RELATIVE ${root}/include/zamba/blocks ${root}/include/zamba/blocks/*.hpp)
foreach(header IN LISTS blocks)
  string(REPLACE ".hpp" ".cpp" file ${header})
  expect(tests/blocks/${file} "every block has a test")
endforeach()

file(GLOB operators RELATIVE ${root}/include/zamba/ops ${root}/include/zamba/ops/*.hpp)
foreach(header IN LISTS operators)
  string(REPLACE ".hpp" ".cpp" file ${header})
  expect(tests/ops/${file} "every operator has a test")
  expect(bench/ops/${file} "every operator has a benchmark")
endforeach()

file(GLOB kernels RELATIVE ${root}/include/zamba/ops ${root}/include/zamba/ops/*.cuh)
foreach(header IN LISTS kernels)
  string(REPLACE ".cuh" ".hpp" file ${header})
  expect(include/zamba/ops/${file} "every operator has a CPU version")
  string(REPLACE ".cuh" ".cu" file ${header})
  expect(tests/ops/${file} "every operator with kernels is tested on CUDA")
  expect(bench/ops/${file} "every operator with kernels is measured on CUDA")
endforeach()

if(missing)
  message(FATAL_ERROR "files that go together:${missing}")
endif()
