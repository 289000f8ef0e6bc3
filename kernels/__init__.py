"""The Triton kernels, one op in a file: `_x_kernel`, its launcher (checks, allocation, grid), its autograd function.

They are installed as `tarflow_fast.kernels`. `launch.py` holds what they share, and shows how they follow one another.
"""
