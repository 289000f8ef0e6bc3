"""Operations of flows that are one pass over memory, forward and back: on CPUs in C++, on GPUs in Triton.

Each is a function that gives what its equation says wherever it is called; which code serves is told in `function.py`.
"""

from .affine_coupling import affine_coupling
from .spline import fused_spline

__all__ = ["affine_coupling", "fused_spline"]
