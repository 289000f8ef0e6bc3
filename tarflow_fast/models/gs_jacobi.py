"""The further arguments of `reverse` in GS-Jacobi's code (arXiv 2505.12849), so that its scripts run with a `TarFlow`.

They say how many Gauss-Seidel segments and Jacobi iterations each flow block is given, and where these start: how near
they come to the exact inverse, which the sequential pass computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ..checks import check_count, check_number
from ..errors import ArgumentError

LISTS = ("num_GS_list", "max_jacobi_list", "guess_list")


def check_iterations(options: Mapping[str, Any], num_blocks: int) -> None:
    """Raises TypeError for other names, and ArgumentError for what the scripts could not mean.

    Warns where iterations are asked for: the result is that of as many as it takes.
    """
    for name, value in options.items():
        if name in LISTS:
            if not isinstance(value, (list, tuple)) or len(value) < num_blocks:
                raise ArgumentError(name, f"a list of {num_blocks} integers, or None", repr(value))
            for entry in value:
                check_count(name, entry, 0)
        elif name == "ebound":
            check_number(name, value, 0)
        else:
            raise TypeError(f"reverse() got an unexpected keyword argument {name!r}")
    if any(options.get("num_GS_list", ())[:num_blocks]):
        warnings.warn(
            "num_GS_list asks for iterations that approach the inverse; what is computed is the inverse itself, token "
            "after token. For parallel passes make a Sampler, with solver='adaptive' and a tol",
            stacklevel=4,
        )
