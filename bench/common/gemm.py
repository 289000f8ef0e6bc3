"""What torch's own products of a pass's shapes take, on the same threads: a limit beside the roofline."""

from __future__ import annotations

from typing import Any

import torch

from .harness import Case
from .limits import fastest
from .record import title


def product_rate(rows: int, k: int, columns: int, dtype: torch.dtype) -> float:
    """Returns the operations per second of torch's product of (rows, k) and (columns, k)ᵀ, the best of its ways."""
    a, w = torch.randn(rows, k).to(dtype), torch.randn(columns, k).to(dtype)
    products = [lambda: torch.nn.functional.linear(a, w), lambda: torch.mm(w, a.t())]
    return 2 * rows * k * columns / fastest(*products)


def limit(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Returns a cell's "gemm": the seconds that the products of all layers take at torch's rates, and their rate.

    A step's rows multiply qkv (C, 3C), proj (C, C) and the MLP's (C, 4C) and (4C, C).
    """
    sizes, rows = case.sizes, case.label["batch"]
    C, steps = sizes.channels, sizes.num_blocks * (sizes.num_patches - 1) * sizes.layers_per_block
    shapes = ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C))
    flops = [2 * rows * k * columns for k, columns in shapes]
    seconds = sum(each / product_rate(rows, *shape, dtype) for each, shape in zip(flops, shapes, strict=True))
    return {"seconds": steps * seconds, "flops_per_second": sum(flops) / seconds}


def table(record: Any) -> list[str]:
    """Returns a line for each cell of a record that has this limit, of the runs' share of it; none if no cell has."""
    lines = [""]
    for cell in record["cells"]:
        if "gemm" in cell:
            seconds, rate = cell["gemm"]["seconds"], cell["gemm"]["flops_per_second"]
            shares = ", ".join(f"{run['name']} {seconds / run['median']:.1%}" for run in cell["runs"])
            lines.append(
                f"torch's products, {title(cell['label'])}: {seconds:.4g} s at {rate / 1e9:.1f} GFLOP/s; {shares}"
            )
    return lines if len(lines) > 1 else []
