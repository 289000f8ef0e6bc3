"""This module makes samplers for modules with ml-tarflow's state dict."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..checkpoints.assembly import build
from ..checkpoints.inference import infer_config
from ..checkpoints.weight_sets import split_prefix
from ..checks import check_weights
from ..errors import ArgumentError
from ..models.agreement import check_agreement
from ..models.tarflow import TarFlow
from ..sampling import Sampler
from ..scalars import check_flag

OPTIONS = tuple(inspect.signature(Sampler).parameters)[1:]  # all but the model


def accelerate(model: nn.Module, *, check: bool = True, **options: Any) -> Sampler:
    """Returns a fast `Sampler` for any module with ml-tarflow's state dict: same `.reverse`, same result.

    The module, such as ml-tarflow's `Model`, is read, not changed. Its patch_size, and the number of attention heads of
    its first layer, are taken from its attributes where it has them, else found as in `load`. One thing differs from
    ml-tarflow: a negative label means "no class" when sampling too.

    Args:
        model: The module; its keys may stand behind one prefix, as in a wrapper.
        check: Whether small density and sampling passes are compared with the module's own, which tells of another
            order of tokens, of hooks and of overridden methods; see `agreement.py`.
        **options: The keyword arguments of `Sampler`.

    Returns:
        A sampler of the module's weights.

    Raises:
        ArgumentError: The model is no module of plain weights with values, or `check` found that it computes another
            thing than a TarFlow with its weights; or an option is wrong, as in `Sampler`.
        BackendError: As in `Sampler`.
        CheckpointError: The state dict is not that of a whole, finite TarFlow.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", "a torch module with ml-tarflow's state dict", type(model).__name__)
    check = check_flag("check", check)
    for name in options.keys() - set(OPTIONS):
        raise ArgumentError("options", f"options of a Sampler, which are {', '.join(OPTIONS)}", repr(name))
    check_weights(model)
    prefix, state = split_prefix(model.state_dict())
    inner: Any = model.get_submodule(prefix.rstrip("."))
    if isinstance(inner, TarFlow):
        return Sampler(inner.flow(check=check), **options)
    width = state["blocks.0.proj_in.weight"].shape[0] if "blocks.0.proj_in.weight" in state else 0
    try:
        head_dim = width // inner.blocks[0].attn_blocks[0].attention.num_heads
    except (AttributeError, TypeError, IndexError):
        head_dim = None
    config = infer_config(state, patch_size=getattr(inner, "patch_size", None), head_dim=head_dim)
    weight = state["blocks.0.proj_in.weight"]
    ours = build(state, config, device=weight.device, dtype=weight.dtype, share=True)
    if check:
        check_agreement(inner, ours)
    return Sampler(ours, **options)
