"""What kernels for GPUs were compiled to, looked at without a GPU: registers, shared memory, and rules on their code.

A backend's `survey.py` yields a `Compiled` for each of its kernels and each architecture. `lint.py` has the rules.
"""

from .compiled import REGISTERS, SHARED_LIMIT, Compiled, cuda_findings, resource_usage, triton_findings

__all__ = [
    "REGISTERS",
    "SHARED_LIMIT",
    "Compiled",
    "cuda_findings",
    "resource_usage",
    "triton_findings",
]
