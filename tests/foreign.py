"""This module has somebody else's TarFlow, for tests of what is taken of others."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tarflow_fast import TarFlow, reference


class Foreign(nn.Module):
    """This is somebody else's TarFlow, by the plain equations: a state dict, patch_size, and a density pass of its own.

    order: a permutation of the tokens of block 0 beside the block's own.
    """

    def __init__(self, model: TarFlow, order: Tensor | None = None, head_dim: int = 64):
        super().__init__()
        self.blocks, self.patch_size, self.order, self.head_dim = model.blocks, model.patch_size, order, head_dim
        self.register_buffer("var", model.var)
        self.spoil: Callable[[Tensor], Tensor] = lambda z: z
        self.scale_log_det = 1.0

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        tokens = reference.patchify(x, self.patch_size)
        tokens = tokens if self.order is None else tokens[:, self.order]
        found = reference.density(self.state_dict(), tokens, y, head_dim=self.head_dim)
        z = self.spoil(found.z)
        return z, [*found.outputs[:-1], z], self.scale_log_det * found.log_det / z[0].numel()
