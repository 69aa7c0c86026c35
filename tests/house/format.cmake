# SPDX-License-Identifier: MIT
# Every tracked source file is as clang-format 14 writes it. Other releases differ in small things, so only that one is
# asked. To correct: git ls-files '*.hpp' '*.cuh' '*.cpp' '*.cu' | xargs clang-format -i
if(NOT GIT OR NOT CLANG_FORMAT)
  message(STATUS "skipped: git and clang-format 14 are needed")
  return()
endif()
execute_process(COMMAND ${CLANG_FORMAT} --version OUTPUT_VARIABLE version)
if(NOT version MATCHES "version 14\\.")
  message(STATUS "skipped: clang-format 14 is needed, this is ${version}")
  return()
endif()
execute_process(COMMAND ${GIT} ls-files -- *.hpp *.cuh *.cpp *.cu OUTPUT_VARIABLE files RESULT_VARIABLE result
                ERROR_QUIET)
if(NOT result EQUAL 0)
  message(STATUS "skipped: this is not a git repository")
  return()
endif()
string(REGEX REPLACE "\n" ";" files "${files}")
list(REMOVE_ITEM files "")
execute_process(COMMAND ${CLANG_FORMAT} --dry-run -Werror ${files} RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "not as clang-format 14 writes it, see above")
endif()
