# Compiler flags, ccache, sanitizers and the CUDA language: what every target of ours is built with.
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -DNDEBUG")

find_program(CCACHE ccache)
if(CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros ${CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()

add_library(dsv3_flags INTERFACE)
target_compile_options(dsv3_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Werror;-Winvalid-pch;-fpch-preprocess>)
if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  target_compile_options(dsv3_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-error=unknown-warning-option>)
endif()
target_include_directories(dsv3_flags INTERFACE ${PROJECT_SOURCE_DIR}/src)
if(DSV3_SANITIZE)
  target_compile_options(dsv3_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${DSV3_SANITIZE};-fno-sanitize-recover=all;-fno-omit-frame-pointer;-g>)
  target_link_options(dsv3_flags INTERFACE -fsanitize=${DSV3_SANITIZE})
endif()

if(DSV3_CUDA)
  # sm_80 is the oldest supported, and its PTX serves what is newer; sm_90a carries Hopper's own instructions.
  set(CMAKE_CUDA_ARCHITECTURES 80 90a-real CACHE STRING "CUDA architectures")
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  # CMake 3.25 does not know how nvcc spells that dialect.
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
  find_package(CUDAToolkit REQUIRED)
endif()
