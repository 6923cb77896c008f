"""The CPU kernels: one module for each layout, and for what happens in it."""
