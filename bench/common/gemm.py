"""What torch's own products of a pass's shapes take, on the same threads: a limit beside the roofline."""

from __future__ import annotations

from typing import Any

import torch

from tarflow_fast import TarFlowConfig

from .limits import fastest
from .record import values


def product_rate(rows: int, k: int, columns: int, dtype: torch.dtype) -> float:
    """Returns the operations per second of torch's product of (rows, k) and (columns, k)ᵀ, the best of its ways."""
    a, w = torch.randn(rows, k).to(dtype), torch.randn(columns, k).to(dtype)
    products = [lambda: torch.nn.functional.linear(a, w), lambda: torch.mm(w, a.t())]
    return 2 * rows * k * columns / fastest(*products)


def limit(config: TarFlowConfig, rows: int, dtype: torch.dtype) -> dict[str, float]:
    """Returns a cell's "gemm": the seconds that the products of all layers take at torch's rates, and their rate.

    rows: those of a step, which multiply qkv (C, 3C), proj (C, C) and the MLP's (C, 4C) and (4C, C).
    """
    C, steps = config.channels, config.num_blocks * (config.num_patches - 1) * config.layers_per_block
    shapes = ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C))
    flops = [2 * rows * k * columns for k, columns in shapes]
    seconds = sum(each / product_rate(rows, *shape, dtype) for each, shape in zip(flops, shapes, strict=True))
    return {"seconds": steps * seconds, "flops_per_second": sum(flops) / seconds}


def table(record: Any) -> list[str]:
    """Returns a line for each cell of a record that has this limit, of the runs' share of it; none if no cell has."""
    found = [cell for cell in record["cells"] if "gemm" in cell]
    lines = [
        f"torch's products, {values(cell)}: {cell['gemm']['seconds']:.4g} s at "
        f"{cell['gemm']['flops_per_second'] / 1e9:.1f} GFLOP/s; "
        + ", ".join(f"{run['name']} {cell['gemm']['seconds'] / run['median']:.1%}" for run in cell["runs"])
        for cell in found
    ]
    return ["", *lines] if lines else []
