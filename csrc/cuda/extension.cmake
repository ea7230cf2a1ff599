# potstill._CUDA: an extension of its own, so that the one for CPUs is the same with and without it. CUDA's runtime is
# linked into it: it needs neither libtorch nor a toolkit where it runs. Contraction is off so that results round as the
# reference's do. C++17, as CMake 3.25 knows no C++20 of nvcc 13. The code of 8.0 also runs on 8.6 and 8.7.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 89-real)
endif()
enable_language(CUDA)

pybind11_add_module(_CUDA NO_EXTRAS csrc/cuda/module.cpp csrc/cuda/int8_24.cu)
set_target_properties(_CUDA PROPERTIES CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY Static)
target_compile_options(_CUDA PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-fmad=false;--threads=0>")
install(TARGETS _CUDA LIBRARY DESTINATION potstill)
