"""Limits beside the roofline: torch's own products on the same threads, of a pass's shapes and of large ones."""

from __future__ import annotations

from typing import Any

import torch

from .harness import Case
from .limits import fastest, names
from .record import Limits, title


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


def hold(cell: Any, limits: Limits, case: Case) -> None:
    """Gives a cell's "gemm" the parts of its time-weighted limit, in seconds: "products" of all layers at the rate of a
    large square product, and "attention", its keys and values at the bandwidth of the cell's "limit". Beside them
    "weights", which products read at that bandwidth: where these take longer, no pass reaches the limit."""
    rate, _ = names(case)
    bandwidth, gemm = cell["limit"]["bytes_per_second"], cell["gemm"]
    weights = case.sizes.num_blocks * (case.sizes.num_patches - 1) * case.work.weight_bytes
    gemm["weighted"] = {
        "products": gemm["seconds"] * gemm["flops_per_second"] / limits[rate],
        "attention": (case.work.bytes - weights) / bandwidth,
        "weights": weights / bandwidth,
    }


def table(record: Any) -> list[str]:
    """Returns two lines for each cell of a record that has these limits, of the runs' shares; none if no cell has."""
    lines = [""]
    for cell in record["cells"]:
        if gemm := cell.get("gemm"):
            lines.append(
                f"torch's products, {title(cell['label'])}: {gemm['seconds']:.4g} s at "
                f"{gemm['flops_per_second'] / 1e9:.1f} GFLOP/s; {_shares(cell, gemm['seconds'])}"
            )
        if parts := (gemm or {}).get("weighted"):
            least = parts["products"] + parts["attention"]
            each = ", ".join(f"{name} {seconds:.4g} s" for name, seconds in parts.items() if name != "weights")
            lines.append(
                f"time-weighted limit, {title(cell['label'])}: {each}; {_shares(cell, least)}; "
                f"to read the weights takes {parts['weights']:.4g} s"
            )
    return lines if len(lines) > 1 else []


def _shares(cell: Any, seconds: float) -> str:
    return ", ".join(f"{run['name']} {seconds / run['median']:.1%}" for run in cell["runs"])
