"""The GPU kernels; each is imported when the first CUDA tensor asks for it, as triton is."""
