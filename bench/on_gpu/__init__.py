"""What ``bench/gpu.py`` does on one GPU: the device's ceilings, parity of every kernel, and times against rivals."""
