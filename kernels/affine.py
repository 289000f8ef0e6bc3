"""The affine update under guidance, as far as `affine_step` and `fixed_point_update` have it in common.

    xa ← xa + g (xa − xa_u),   xb ← xb + g (xb − xb_u),     x = z · exp(xa) + xb

(xa, xb) are the parameters that the transformer gives after the token before, (xa_u, xb_u) are those of the unguided
branch, and g is the guidance at that position. Volume-preserving blocks have xa = 0 and store no values for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tarflow_fast.checks import GUIDE_WHAT, check_choice
from tarflow_fast.errors import ArgumentError

from .launch import check_operand, padded


@dataclass(frozen=True)
class Rule:
    """The rule by which parameters become tokens.

    nvp: whether the parameters have an xa. guidance: (T − 1,) fp32, g after each token, or None. what: "a", "b" or
    "ab", the parameters that are guided.
    """

    nvp: bool = True
    guidance: Tensor | None = None
    what: str = "ab"

    @property
    def branches(self) -> int:
        """Returns the number of branches: 2 with guidance, else 1."""
        return 1 if self.guidance is None else 2

    def check(self, T: int, device: torch.device) -> None:
        """Raises ArgumentError unless this is a rule for sequences of T tokens on this device."""
        check_choice("rule.what", self.what, GUIDE_WHAT)
        if self.guidance is not None:
            check_operand("rule.guidance", self.guidance, (max(T - 1, 0),), torch.float32, device)

    def check_tokens(self, parameters: Tensor, z: Tensor, x: Tensor, token_log_det: Tensor, window: int) -> None:
        """Raises ArgumentError unless the operands of an update over this window fit each other.

        parameters: (branches·B·window, 2D or D) fp32. z, x: (B, T, D) fp32. token_log_det: (B, T) fp32.
        """
        B, T, D = check_operand("z", z, (-1, -1, -1), torch.float32).shape
        self.check(T, z.device)
        if not 1 <= window <= T - 1:
            raise ArgumentError("window", f"an integer from 1 to T − 1 = {T - 1}", window)
        wanted = (self.branches * B * window, 2 * D if self.nvp else D)
        check_operand("parameters", parameters, wanted, torch.float32, z.device)
        check_operand("x", x, (B, T, D), torch.float32, z.device)
        check_operand("token_log_det", token_log_det, (B, T), torch.float32, z.device)

    def constants(self, D: int) -> dict[str, object]:
        """Returns the constants that kernels are compiled for."""
        return {
            "D": D,
            "BLOCK_D": padded(D),
            "NVP": self.nvp,
            "GUIDE_A": self.guidance is not None and "a" in self.what,
            "GUIDE_B": self.guidance is not None and "b" in self.what,
        }


def reference(parameters: Tensor, z: Tensor, rule: Rule, start: int) -> tuple[Tensor, Tensor]:
    """Returns the tokens start … start + window − 1 and their log-dets, (B, window, D) and (B, window), by PyTorch.

    parameters: (branches, B, window, 2D or D), those after the tokens before. z: (B, T, D).
    """
    window = slice(start, start + parameters.shape[2])
    xa, xb = parameters.chunk(2, -1) if rule.nvp else (torch.zeros_like(parameters), parameters)
    if rule.guidance is None:
        xa, xb = xa[0], xb[0]
    else:
        g = rule.guidance[start - 1 : window.stop - 1, None].to(xa.dtype)
        xa = xa[0] + g * (xa[0] - xa[1]) if "a" in rule.what else xa[0]
        xb = xb[0] + g * (xb[0] - xb[1]) if "b" in rule.what else xb[0]
    return z[:, window] * xa.exp() + xb, xa.sum(-1)


@triton.jit
def affine_tokens(
    parameters, z, guidance, row, rows, sample, token, inside, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NVP: tl.constexpr, GUIDE_A: tl.constexpr, GUIDE_B: tl.constexpr,
):  # fmt: skip
    """Returns new tokens, their log-dets and exp(−xa): (N, BLOCK_D), (N,) and (N, BLOCK_D) fp32.

    Rows that are not inside have arbitrary values. row: (N,), the row of the parameters; that of the unguided branch is
    `rows` further down. sample, token: (N,), which tokens these are. The guidance of a token is that after the token
    before.
    """
    d = tl.arange(0, BLOCK_D)
    there = inside[:, None] & (d < D)[None, :]
    WIDTH: tl.constexpr = 2 * D if NVP else D
    place = parameters + row.to(tl.int64)[:, None] * WIDTH + d[None, :]
    if GUIDE_A or GUIDE_B:
        unguided = place + tl.cast(rows, tl.int64) * WIDTH
        g = tl.load(guidance + token - 1, mask=inside, other=0.0)[:, None]
    xb = tl.load(place + (WIDTH - D), mask=there, other=0.0)
    if GUIDE_B:
        xb += g * (xb - tl.load(unguided + (WIDTH - D), mask=there, other=0.0))
    x = tl.load(z + (sample.to(tl.int64) * T + token)[:, None] * D + d[None, :], mask=there, other=0.0)
    if NVP:
        xa = tl.load(place, mask=there, other=0.0)
        if GUIDE_A:
            xa += g * (xa - tl.load(unguided, mask=there, other=0.0))
        return x * tl.exp(xa) + xb, tl.sum(xa, 1), tl.exp(-xa)
    else:
        return x + xb, tl.zeros_like(tl.sum(x, 1)), tl.full(x.shape, 1.0, tl.float32)
