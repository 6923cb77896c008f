"""The GPU kernels: CUDA source, launched through CuPy."""
