# SPDX-License-Identifier: MIT
# cmake -D COMPILER=... -D INCLUDES=a;b -D CASE=case.cpp -P check.cmake
# Passes if CASE compiles, does not compile with ZAMBA_EXPECT_FAILURE, and the compiler then prints every expected text,
# the first of them below at most 15 lines that tell how it came there, and 60 lines in all, or as many as the case says.
file(STRINGS ${CASE} expected REGEX "^// expect: ")
list(TRANSFORM expected REPLACE "^// expect: " "")
if(NOT expected)
  message(FATAL_ERROR "  ${CASE}: no line says `// expect: <text of the message>`")
endif()

# Of a case whose mistake is a flag, `// good flags: ...` and `// bad flags: ...` tell the forms apart.
foreach(form good bad)
  file(STRINGS ${CASE} ${form}_flags REGEX "^// ${form} flags: " LIMIT_COUNT 1)
  string(REPLACE "// ${form} flags: " "" ${form}_flags "${${form}_flags}")
  separate_arguments(${form}_flags UNIX_COMMAND "${${form}_flags}")
endforeach()

list(TRANSFORM INCLUDES PREPEND "-I")  # of a system folder this changes nothing, unlike -isystem
set(compile ${CMAKE_COMMAND} -E env LC_ALL=C ${COMPILER} -std=c++20 -fsyntax-only -fmessage-length=0 ${INCLUDES} ${CASE})

execute_process(COMMAND ${compile} ${good_flags} RESULT_VARIABLE result ERROR_VARIABLE output OUTPUT_QUIET)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "  ${CASE}: the good form does not compile:\n${output}")
endif()

execute_process(COMMAND ${compile} ${bad_flags} -DZAMBA_EXPECT_FAILURE RESULT_VARIABLE result ERROR_VARIABLE output OUTPUT_QUIET)
if(result EQUAL 0)
  message(FATAL_ERROR "  ${CASE}: the bad form compiles")
endif()
foreach(text IN LISTS expected)
  string(FIND "${output}" "${text}" position)
  if(position EQUAL -1)
    message(FATAL_ERROR "  ${CASE}: the compiler did not print the expected text\n  ${text}\nbut\n${output}")
  endif()
endforeach()

set(most 60)
file(STRINGS ${CASE} said REGEX "^// lines: [0-9]+$" LIMIT_COUNT 1)
if(said)
  string(REPLACE "// lines: " "" most "${said}")
endif()
list(GET expected 0 text)
string(FIND "${output}" "${text}" position)
string(SUBSTRING "${output}" 0 ${position} before)
string(REGEX REPLACE "[^\n]" "" newlines_before "${before}")
string(REGEX REPLACE "[^\n]" "" newlines "${output}")
string(LENGTH "${newlines_before}" before)
string(LENGTH "${newlines}" lines)
if(before GREATER 15)
  message(FATAL_ERROR "  ${CASE}: ${before} lines come before the expected text\n  ${text}\nin\n${output}")
endif()
if(lines GREATER most)
  message(FATAL_ERROR "  ${CASE}: the compiler prints ${lines} lines, at most ${most} were to be\n${output}")
endif()
