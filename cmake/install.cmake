# SPDX-License-Identifier: MIT
# Headers, the package for find_package(zamba), and zamba.pc. All of it may be moved after installation.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/zamba)
set(pc_dir ${CMAKE_INSTALL_DATADIR}/pkgconfig)

install(DIRECTORY include/zamba DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh")
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

install(TARGETS zamba zamba_cuda EXPORT zambaTargets)
install(EXPORT zambaTargets NAMESPACE zamba:: DESTINATION ${package_dir})
configure_package_config_file(cmake/zambaConfig.cmake.in ${PROJECT_BINARY_DIR}/zambaConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/zambaConfigVersion.cmake COMPATIBILITY SameMinorVersion
                                 ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/zambaConfig.cmake ${PROJECT_BINARY_DIR}/zambaConfigVersion.cmake
              cmake/zamba_optional.cmake DESTINATION ${package_dir})

file(RELATIVE_PATH ZAMBA_PC_TO_PREFIX /prefix/${pc_dir} /prefix)
string(REGEX REPLACE "/$" "" ZAMBA_PC_TO_PREFIX "${ZAMBA_PC_TO_PREFIX}")
configure_file(cmake/zamba.pc.in ${PROJECT_BINARY_DIR}/zamba.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/zamba.pc DESTINATION ${pc_dir})
