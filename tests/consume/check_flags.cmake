# SPDX-License-Identifier: MIT
# zamba::zamba asks for C++20 and its dependencies, and for no compiler flag of its own taste.
get_target_property(options zamba::zamba INTERFACE_COMPILE_OPTIONS)
get_target_property(definitions zamba::zamba INTERFACE_COMPILE_DEFINITIONS)
if(options OR definitions)
  message(FATAL_ERROR "zamba::zamba passes on flags: ${options} ${definitions}")
endif()
