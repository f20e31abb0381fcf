# Finds the LibTorch inside the official torch wheel (or any directory with include/ and lib/) without
# its own TorchConfig.cmake, which insists on a CUDA toolkit even for a CPU program.
#
# Looks at, in order: -DLIBTORCH=…, the environment's LIBTORCH, third_party/libtorch (scripts/setup.sh).
# Defines LibTorch::LibTorch (libtorch_cpu and libc10; with DSV3_CUDA also libtorch_cuda and libc10_cuda).
set(LIBTORCH "$ENV{LIBTORCH}" CACHE PATH "Directory that holds LibTorch's include/ and lib/")
set(_candidates ${LIBTORCH} ${PROJECT_SOURCE_DIR}/third_party/libtorch)
foreach(_dir IN LISTS _candidates)
  if(EXISTS ${_dir}/include/ATen/core/Tensor.h AND EXISTS ${_dir}/lib/libtorch_cpu.so)
    file(REAL_PATH ${_dir} LibTorch_ROOT_DIR)
    break()
  endif()
endforeach()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_ROOT_DIR
  REASON_FAILURE_MESSAGE "run scripts/setup.sh, or set LIBTORCH=/path/to/torch (it must hold include/ and lib/)")

if(LibTorch_FOUND AND NOT TARGET LibTorch::LibTorch)
  file(STRINGS ${LibTorch_ROOT_DIR}/include/torch/headeronly/version.h _version REGEX "^ *\"[0-9.]+")
  string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" LibTorch_VERSION "${_version}")
  add_library(LibTorch::LibTorch INTERFACE IMPORTED)
  # The wheel's include directory carries headers of another fmt, whose symbols nobody exports: let the
  # system's fmt, the one we link, be found before it.
  find_path(_fmt_dir fmt/format.h REQUIRED NO_CMAKE_FIND_ROOT_PATH)
  file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/include_first)
  file(CREATE_LINK ${_fmt_dir}/fmt ${PROJECT_BINARY_DIR}/include_first/fmt SYMBOLIC)
  target_include_directories(LibTorch::LibTorch SYSTEM INTERFACE ${PROJECT_BINARY_DIR}/include_first
    ${LibTorch_ROOT_DIR}/include ${LibTorch_ROOT_DIR}/include/torch/csrc/api/include)
  set(_libs ${LibTorch_ROOT_DIR}/lib/libtorch_cpu.so ${LibTorch_ROOT_DIR}/lib/libc10.so)
  if(DSV3_CUDA)
    # libtorch_cuda registers its kernels when it is loaded; nothing of ours names a symbol of it.
    list(APPEND _libs -Wl,--no-as-needed ${LibTorch_ROOT_DIR}/lib/libtorch_cuda.so
      ${LibTorch_ROOT_DIR}/lib/libc10_cuda.so -Wl,--as-needed)
    target_include_directories(LibTorch::LibTorch SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
    target_compile_definitions(LibTorch::LibTorch INTERFACE USE_CUDA)
  endif()
  # The wheel's libraries name their own dependencies by run path; the linker need not resolve those.
  target_link_libraries(LibTorch::LibTorch INTERFACE ${_libs} -Wl,--allow-shlib-undefined)
  # One OpenMP runtime in the process: the one that LibTorch ships (same SONAME as the compiler's).
  set(CMAKE_BUILD_RPATH ${LibTorch_ROOT_DIR}/lib)
  set(CMAKE_INSTALL_RPATH ${LibTorch_ROOT_DIR}/lib)
endif()
