"""Whether a module computes what our own model makes of its weights: a small density pass of each, held together.

A state dict does not tell of another order of tokens, of hooks, of methods that were overridden, of heads of another
size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ArgumentError
from .model import TarFlow

AGREE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far tokens may be off, see `_distance`, by the dtype of the module's weights: in half precision the module's own
residual stream is rounded, and ours is fp32."""

SENSITIVE, MOST = 30, 0.3  # times what a rounding of the images makes of them, where that is more, and at most
ALTERNATIVE = "check=False takes the weights without asking what the module makes of them"


def check_agreement(module: nn.Module, ours: TarFlow) -> None:
    """Raises ArgumentError if the module's tokens after any block, or its log-det, are not ours, for two images.

    ours: made of the module's weights, on its device and in its dtype. A module that has no forward pass holds weights
    and no more: there is nothing to compare. The module is as before: its mode of training, its gradients, and the
    states of torch's random generators.
    """
    if type(module).forward is nn.Module.forward and "forward" not in module.__dict__:
        return
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(ours.device.type, enabled=False):
        try:
            theirs = _density(module, ours)
        except Exception as error:  # whatever a foreign module raises
            if ours.dtype == torch.float32:
                expected = f"a module that gives (z, outputs, log-det) of images; {ALTERNATIVE}"
                raise ArgumentError("model", expected, f"{type(error).__name__}: {_first_line(error)}") from error
            # ml-tarflow's own norms take weights in fp32 alone.
            check_agreement(copy.deepcopy(module).float(), copy.deepcopy(ours).float())
            return
        wanted, rounded = _density(ours, ours), _density(ours, ours, rounded=True)
    for part, true, moved in zip(theirs, wanted, rounded, strict=True):
        off, most = _distance(part, true), max(AGREE[ours.dtype], min(SENSITIVE * _distance(moved, true), MOST))
        if not off <= most:
            expected = f"one whose density pass is a TarFlow's with its weights, within {most:.1g}; {ALTERNATIVE}"
            got = f"{off:.2g}: it may have another order of tokens, hooks, overridden methods, or other heads"
            raise ArgumentError("model", expected, got)


def _density(module: nn.Module, ours: TarFlow, rounded: bool = False) -> list[Tensor]:
    """The tokens after each block, and the log-det of a value, (B, …) fp64 each. rounded: of images a rounding off."""
    x, classes = _images(ours), ours.config.num_classes
    if rounded:
        x = x * (1 + torch.finfo(x.dtype).eps * torch.sign(x.flip(-1)))
    arguments = (x, torch.tensor([0, classes - 1], device=ours.device)) if classes else (x,)
    with _undisturbed(module):
        z, outputs, log_det, *_ = module(*arguments)
    tokens = [*outputs, z]
    if len(outputs) != ours.config.num_blocks or any(each.numel() != x.numel() for each in tokens):
        raise ValueError(f"{len(outputs)} outputs, z of shape {tuple(z.shape)}")
    # The log-det is a mean, whose scale is that of a token's value.
    return [each.reshape(len(x), -1).double().cpu() for each in (*tokens, log_det)]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _images(model: TarFlow) -> Tensor:
    """Two images as a model may know them: smooth, and a little noise. No random generator of torch is drawn from."""
    shape = model.config.data_shape
    draw = np.random.Generator(np.random.Philox(0))
    ch, *size = shape if len(shape) == 3 else (1, *shape)
    coarse, noise = (torch.from_numpy(draw.standard_normal((2, ch, *sides))) for sides in ((2, 2), size))
    smooth = F.interpolate(coarse, size=tuple(size), mode="bilinear", align_corners=True)
    return (0.4 * smooth + 0.1 * noise).reshape(2, *shape).to(model.device, model.dtype)


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of a sample's differences in units of its values, or of 1 where these are less, of the sample
    where it is most. What is not finite in `wanted` does not count; where the other alone is not, it is infinite."""
    known = wanted.isfinite()
    gap = torch.where(known, found - wanted, 0).nan_to_num(torch.inf)
    size = torch.where(known, wanted, 0).square().mean(1).sqrt().clamp(min=1)
    return float((gap.square().mean(1).sqrt() / size).max())


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """The module without dropout, and afterwards as it was."""
    training = [(each, each.training) for each in module.modules()]
    cuda = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        try:
            for each, _ in training:
                each.training = False
            yield
        finally:
            for each, mode in training:
                each.training = mode
