# Imported targets for LibTorch out of a wheel's torch folder or a libtorch folder; touches no global flag.
#   LibTorch::cpu   headers, c10 and torch_cpu
#   LibTorch::cuda  the above with c10_cuda and torch_cuda (only with HADAL_CUDA=ON)
# LIBTORCH_ROOT names the folder that holds include/ and lib/ (default: the one tools/install_deps.sh makes).
set(LIBTORCH_ROOT "${CMAKE_SOURCE_DIR}/.deps/libtorch-2.11.0" CACHE PATH "folder with LibTorch's include/ and lib/")
if(NOT EXISTS "${LIBTORCH_ROOT}/include/ATen/ATen.h")
  message(FATAL_ERROR "LibTorch not found in ${LIBTORCH_ROOT}: run tools/install_deps.sh or set LIBTORCH_ROOT")
endif()
function(_libtorch_import name)
  find_library(LIBTORCH_${name}_LIBRARY ${name} PATHS "${LIBTORCH_ROOT}/lib" NO_DEFAULT_PATH REQUIRED)
  add_library(LibTorch::${name} SHARED IMPORTED)
  set_target_properties(LibTorch::${name} PROPERTIES IMPORTED_LOCATION "${LIBTORCH_${name}_LIBRARY}")
  target_include_directories(LibTorch::${name} SYSTEM INTERFACE
    "${LIBTORCH_ROOT}/include" "${LIBTORCH_ROOT}/include/torch/csrc/api/include")
endfunction()
_libtorch_import(c10)
_libtorch_import(torch_cpu)
add_library(LibTorch::cpu INTERFACE IMPORTED)
target_link_libraries(LibTorch::cpu INTERFACE LibTorch::torch_cpu LibTorch::c10)
# The wheel's own copies of libgomp, cudart and cupti are found through its run path; the linker needs a hint.
target_link_options(LibTorch::cpu INTERFACE "-Wl,-rpath-link,${LIBTORCH_ROOT}/lib" "-Wl,-rpath,${LIBTORCH_ROOT}/lib")
if(HADAL_CUDA STREQUAL "ON")
  _libtorch_import(c10_cuda)
  _libtorch_import(torch_cuda)
  add_library(LibTorch::cuda INTERFACE IMPORTED)
  # torch_cuda registers its kernels when it is loaded, so it must stay linked although nothing names it.
  target_link_libraries(LibTorch::cuda INTERFACE LibTorch::cpu LibTorch::c10_cuda
    "-Wl,--no-as-needed" LibTorch::torch_cuda "-Wl,--as-needed")
endif()
