"""Kernels in CUDA C++, in ``potstill._CUDA``, which only ``-DPOTSTILL_CUDA=ON`` builds. No op uses them."""
