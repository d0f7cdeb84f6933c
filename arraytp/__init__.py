"""Target propagation written out on arrays: NumPy on the CPU, CuPy on the GPU."""

__version__ = "0.1.0"
