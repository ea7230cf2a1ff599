# The list of ISAs, and how their kernels are compiled: for the extension and for the parity test.
#
# One object per ISA, each from the same source, called kernels_<isa>. -fno-lto keeps the linker from mixing them;
# contraction is off so that all of them round alike.
function(add_kernels target isa)
  add_library(${target} OBJECT ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/kernels.cpp)
  target_compile_definitions(${target} PRIVATE POTSTILL_ISA=${isa})
  target_compile_options(${target} PRIVATE -O3 -fno-lto -ffp-contract=off -fno-math-errno -fno-exceptions -fno-rtti
                                           ${ARGN})
  target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
endfunction()

set(flags_scalar)
set(flags_avx2 -mavx2 -mfma)
# gcc 12's own intrinsics trip these two warnings (GCC bug 105593).
set(flags_avx512 -Wno-uninitialized -Wno-maybe-uninitialized -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma
                 -mprefer-vector-width=512)
set(flags_avx512vnni ${flags_avx512} -mavx512vnni)
set(flags_neon -march=armv8.2-a+dotprod)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(isas scalar avx2 avx512 avx512vnni)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(isas scalar neon)
else()
  set(isas scalar)
endif()

foreach(isa ${isas})
  add_kernels(kernels_${isa} ${isa} ${flags_${isa}})
endforeach()
