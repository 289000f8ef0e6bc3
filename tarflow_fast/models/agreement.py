"""Whether a module computes what our own model makes of its weights: small passes of each, both ways, held together.

A state dict does not tell of another order of tokens, of hooks, of methods that were overridden, of heads of another
size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtypes import residual_dtype
from ..errors import ArgumentError, first_line
from .density import TarFlowDensity

AGREE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far tokens may be off, see `_distance`, by the dtype of the module's weights: in half precision the module's own
residual stream is rounded, and ours is fp32."""

SENSITIVE, MOST = 30, 0.3  # times what a rounding of the inputs makes of them, where that is more, and at most
ALTERNATIVE = "accelerate(model, check=False) takes the weights without asking what the module makes of them"
DENSITY_TOKENS, LATENTS = 4096, 2**22  # of a comparison: so many images of different classes, and at least two
PREFIX = 3  # tokens of a block that sampling is compared for: a whole pass takes a foreign module T − 1 steps a block
GUIDANCE = 0.5


def check_agreement(module: nn.Module, ours: TarFlowDensity) -> None:
    """Raises ArgumentError if what the module makes of a few images and latents is not ours.

    Of images it is the tokens after any block, and the log-det; of latents, where the module has a `reverse`, the
    images, with and without guidance. Labels are as many as are cheap, at even distances, and none.
    ours: made of the module's weights, on its device and in its dtype. A module that has no forward pass holds weights
    and no more: there is nothing to compare. The module is as before: its mode of training, its gradients, and the
    states of torch's random generators.
    """
    if type(module).forward is nn.Module.forward and "forward" not in module.__dict__:
        return
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(ours.device.type, enabled=False):
        try:
            theirs = _density(module, ours)
            # That of a model of ours is a sampler's.
            sampled = (
                None if isinstance(module, TarFlowDensity) or not hasattr(module, "reverse") else _sampled(module, ours)
            )
        except Exception as error:  # whatever a foreign module raises
            if ours.dtype == torch.float32:
                expected = f"a module that gives (z, outputs, log-det) of images, and images of latents; {ALTERNATIVE}"
                raise ArgumentError("model", expected, f"{type(error).__name__}: {first_line(error)}") from error
            # ml-tarflow's own norms take weights in fp32 alone.
            check_agreement(copy.deepcopy(module).float(), copy.deepcopy(ours).float())
            return
        _hold("density pass", theirs, _density(ours, ours), _density(ours, ours, rounded=True), ours)
        if sampled is not None:
            images, tokens = sampled
            wanted, rounded = (_wanted(ours, tokens, rounded=rounded) for rounded in (False, True))
            _hold("reverse", _ends(images, ours, tokens), wanted, rounded, ours)


def _hold(what: str, found: list[Tensor], wanted: list[Tensor], rounded: list[Tensor], ours: TarFlowDensity) -> None:
    """Raises ArgumentError where results, (B, …) fp64 each, are farther off than rounding of the inputs explains."""
    for part, true, moved in zip(found, wanted, rounded, strict=True):
        off, most = _distance(part, true), max(AGREE[ours.dtype], min(SENSITIVE * _distance(moved, true), MOST))
        if not off <= most:
            expected = f"one whose {what} is a TarFlow's with its weights, within {most:.1g}; {ALTERNATIVE}"
            got = f"{off:.2g}: it may have another order of tokens, hooks, overridden methods, or other heads"
            raise ArgumentError("model", expected, got)


def _density(module: nn.Module, ours: TarFlowDensity, rounded: bool = False) -> list[Tensor]:
    """The tokens after each block, and the log-det of a value, (B, …) fp64 each; where there are classes, of images
    with labels and then of images without. rounded: of images a rounding off."""
    labels = _labels(ours, DENSITY_TOKENS // ours.config.num_patches)
    x = _images(ours, 2 if labels is None else len(labels))
    x = _rounded(x) if rounded else x
    with _undisturbed(module):
        results = [module(x)] if labels is None else [module(x, labels), module(x[:2])]
    found = []
    for z, outputs, log_det, *_ in results:
        tokens = [*outputs, z]
        if len(outputs) != ours.config.num_blocks or any(each.numel() != x[: len(z)].numel() for each in tokens):
            raise ValueError(f"{len(outputs)} outputs, z of shape {tuple(z.shape)}")
        # The log-det is a mean, whose scale is that of a token's value.
        found += [each.reshape(len(z), -1).double().cpu() for each in (*tokens, log_det)]
    return found


class _Prefix(nn.Module):
    """A block that inverts the first tokens of its order, and leaves the others as they are."""

    def __init__(self, block: nn.Module, flip: bool):
        super().__init__()
        self.block, self.rows = block, slice(-PREFIX, None) if flip else slice(PREFIX)

    def reverse(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        x = x.clone()
        block: Any = self.block
        x[:, self.rows] = block.reverse(x[:, self.rows].clone(), *arguments, **named)
        return x


def _sampled(module: nn.Module, ours: TarFlowDensity) -> tuple[list[Tensor], int]:
    """(images that the module makes of latents, unguided and guided; of how many tokens its blocks inverted)."""
    if "reverse" not in module.__dict__:  # which is bound to the module as it is
        view = object.__new__(type(module))
        blocks: Any = getattr(module, "blocks", ())
        own: Any = ours.blocks
        short = [_Prefix(block, our.permutation.is_reverse) for block, our in zip(blocks, own, strict=True)]
        view.__dict__.update(module.__dict__, _modules={**module._modules, "blocks": nn.ModuleList(short)})
        try:
            return _reversed(view, module, ours, PREFIX), PREFIX
        except Exception:  # it may want all tokens, or something else of its blocks
            for block in blocks:
                if hasattr(block, "set_sample_mode"):
                    block.set_sample_mode(False)
    return _reversed(module, module, ours, ours.config.num_patches), ours.config.num_patches


def _reversed(view: Any, module: nn.Module, ours: TarFlowDensity, tokens: int) -> list[Tensor]:
    z, labels = _latents(ours, tokens)
    with _undisturbed(module):
        return [view.reverse(z.clone(), labels), view.reverse(z.clone(), labels, guidance=GUIDANCE)]


def _wanted(ours: TarFlowDensity, tokens: int, rounded: bool) -> list[Tensor]:
    """What `_ends` is to be."""
    z, labels = _latents(ours, tokens)
    z = (_rounded(z) if rounded else z).to(residual_dtype(ours.dtype))
    found = []
    for guidance in (0.0, GUIDANCE):
        x = z * ours.var.to(z.dtype).sqrt()
        for block in reversed(ours.blocks):
            x = _inverted(block, x, labels, guidance, tokens)
        found.append(ours.unpatchify(x))
    return _ends(found, ours, tokens)


def _inverted(block: Any, x: Tensor, labels: Tensor | None, guidance: float, tokens: int) -> Tensor:
    """ml-tarflow's loop, for the first tokens of the block's order; x: (B, T, D), in that of the data."""
    x, position = block.permutation(x.clone()), block.permutation(block.pos_embed, dim=0)
    block.set_sample_mode(True)
    for i in range(tokens - 1):
        a, b = block.reverse_step(x, position, i, labels)
        if guidance:
            a_u, b_u = block.reverse_step(x, position, i, None, which_cache="uncond")
            a, b = a + guidance * (a - a_u), b + guidance * (b - b_u)
        x[:, i + 1] = x[:, i + 1] * a[:, 0].exp() + b[:, 0]
    block.set_sample_mode(False)
    restored: Tensor = block.permutation(x, inverse=True)
    return restored


def _ends(images: list[Tensor], ours: TarFlowDensity, tokens: int) -> list[Tensor]:
    """The tokens that blocks inverted, and all, of each batch: (B, …) fp64, for `_hold`."""
    found = []
    for each in images:
        x = ours.patchify(each).double().cpu()
        found += [torch.cat([x[:, :tokens], x[:, -tokens:]], dim=1).flatten(1), x.flatten(1)]
    return found


def _labels(model: TarFlowDensity, most: int) -> Tensor | None:
    """Different classes, the first and the last among them, (B,): so many or all, and at least two rows."""
    classes = model.config.num_classes
    rows = max(2, min(classes, most))
    return torch.arange(rows, device=model.device) * (classes - 1) // (rows - 1) if classes else None


def _latents(model: TarFlowDensity, tokens: int) -> tuple[Tensor, Tensor | None]:
    """z, (B, T, D), and labels; two rows where all tokens are to be inverted."""
    T, D = model.var.shape
    labels = _labels(model, LATENTS // (T * D) if tokens < T else 2)
    draw = np.random.Generator(np.random.Philox(1))
    z = torch.from_numpy(draw.standard_normal((2 if labels is None else len(labels), T, D)))
    return z.to(model.device, model.dtype), labels


def _rounded(x: Tensor) -> Tensor:
    return x * (1 + torch.finfo(x.dtype).eps * torch.sign(x.flip(-1)))


def _images(model: TarFlowDensity, count: int) -> Tensor:
    """Images as a model may know them: smooth, and a little noise. No random generator of torch is drawn from."""
    shape = model.config.data_shape
    draw = np.random.Generator(np.random.Philox(0))
    ch, *size = shape if len(shape) == 3 else (1, *shape)
    coarse, noise = (torch.from_numpy(draw.standard_normal((count, ch, *sides))) for sides in ((2, 2), size))
    smooth = F.interpolate(coarse, size=tuple(size), mode="bilinear", align_corners=True)
    return (0.4 * smooth + 0.1 * noise).reshape(count, *shape).to(model.device, model.dtype)


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
