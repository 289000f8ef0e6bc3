"""The linear layer of the `torch` backend: which product is quick for few rows depends on device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# From so many rows on, oneDNN's product with a weight laid out in advance beats the BLAS that torch was built with:
# by 2.2 with MKL on an AMD EPYC (family 26), for widths 128 to 1024; below, the matrix-vector product is ahead.
ONEDNN_ROWS = 8


class Linear:
    """y = x Wᵀ + b, or gelu(x Wᵀ + b) with the exact (erf) GELU.

    weight: (out, in), bias: (out,), of one dtype and device. On a CPU in fp32 the weight is kept transposed, for
    torch.addmm, and from the first call with ONEDNN_ROWS rows or more also in oneDNN's own layout; elsewhere, and with
    fused=False (under torch.compile, which lowers the plain expression itself), this is torch's linear.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False, fused: bool = True):
        self.weight, self.bias, self.gelu = weight.contiguous(), bias.contiguous(), gelu
        self.fp32_cpu = fused and weight.device.type == "cpu" and weight.dtype == torch.float32
        self.onednn = self.fp32_cpu and torch.backends.mkldnn.is_available()
        self.packed: Tensor | None = None
        if self.fp32_cpu:
            self.weight = weight.t().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """x: (rows, in). Returns (rows, out)."""
        if not self.fp32_cpu:
            y = F.linear(x, self.weight, self.bias)
        elif self.onednn and x.shape[0] >= ONEDNN_ROWS:
            if self.packed is None:
                self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.t().contiguous(), None)
            gelu = "gelu" if self.gelu else "none"
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, gelu, [], "none")
            return out
        else:
            y = torch.addmm(self.bias, x, self.weight)
        return F.gelu(y) if self.gelu else y
