"""Triton kernels, one op in a file: `_x_kernel`, its launcher (checks, allocation, grid), its autograd function.

Installed as `tarflow_fast.kernels`. What they share, and how they follow one another, is in `launch.py`.
"""
