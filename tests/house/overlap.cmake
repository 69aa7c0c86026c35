# SPDX-License-Identifier: MIT
# cmake -P overlap.cmake <root>: fails, naming the kernel, where one that launch() may queue beside the one before it
# lacks launch_dependents() as its first call or grid_dependency_wait() after it (kernel/launch.cuh has the rules).
# Kernels queued by <<< >>>, or with attributes of their own (cudaLaunchKernelEx), do not overlap, and need neither.
set(root ${CMAKE_ARGV3})
set(wrong)

file(GLOB_RECURSE headers RELATIVE ${root} ${root}/include/*.cuh)
set(plain)  # kernels that launch() does not queue
foreach(header IN LISTS headers)
  file(READ ${root}/${header} text)
  string(REGEX MATCHALL "[a-z0-9_]+_kernel(<[A-Za-z0-9_, ]+>)?[ \n]*<<<" found "${text}")
  foreach(one IN LISTS found)
    string(REGEX MATCH "^[a-z0-9_]+" name "${one}")
    list(APPEND plain ${name})
  endforeach()
  if(text MATCHES "cudaLaunchKernelEx" AND NOT header MATCHES "kernel/launch.cuh")
    string(REGEX MATCHALL "[a-z0-9_]+_kernel" found "${text}")
    list(APPEND plain ${found})
  endif()
endforeach()

foreach(header IN LISTS headers)
  file(READ ${root}/${header} text)
  string(FIND "${text}" "\n__global__" at)
  while(NOT at EQUAL -1)
    string(SUBSTRING "${text}" ${at} -1 text)
    string(FIND "${text}" "\n}\n" end)
    string(SUBSTRING "${text}" 0 ${end} body)
    string(REGEX MATCH "[a-z0-9_]+_kernel" name "${body}")
    list(FIND plain "${name}" is_plain)
    string(FIND "${body}" "launch_dependents();" begins)
    string(FIND "${body}" "grid_dependency_wait();" waits)
    if(is_plain EQUAL -1 AND (begins EQUAL -1 OR waits LESS begins))
      set(wrong "${wrong}\n  ${name} in ${header}")
    endif()
    string(SUBSTRING "${text}" ${end} -1 text)
    string(FIND "${text}" "\n__global__" at)
  endwhile()
endforeach()

if(wrong)
  message(FATAL_ERROR "kernels without launch_dependents() and grid_dependency_wait():${wrong}")
endif()
