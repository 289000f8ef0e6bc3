"""Writes every block of the golden cases as plain numbers, which csrc/cpu/check/golden.cpp reads where no Python is:
`python tests/golden/flat.py FILE`. What goes into a block and comes out of it is what the published code returned."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cases import GOLDEN, Case

from tarflow_fast.backend.cpu.engine import CpuEngine
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.reference import patchify

SIZES = ("tokens", "token_dim", "channels", "layers", "head_dim", "hidden", "affine")


def write(file: BinaryIO, integers: list[int], tensors: list[Tensor]) -> None:
    """Writes int64 values, then all values of the tensors as fp32."""
    file.write(np.array(integers, np.int64).tobytes())
    for tensor in tensors:
        file.write(np.ascontiguousarray(tensor.detach().numpy(), np.float32).tobytes())


def write_blocks(file: BinaryIO, case: Case) -> None:
    model, way = case.model(), case.tensor("out.reverse_sequence")
    names = {"guidance": "scale", "guide_what": "what", "attn_temp": "attn_temp", "annealed_guidance": "annealed"}
    guidance = Guidance(**{names[name]: value for name, value in case.reverse_args.items()})
    patch, blocks = case.constructor["patch_size"], case.constructor["num_blocks"]
    scale = model.var.detach().sqrt()
    for stage, k in enumerate(reversed(range(blocks))):
        z, x = patchify(way[stage], patch), patchify(way[stage + 1], patch)
        z = z * scale if stage == 0 else z
        z, x = (tokens.flip(1) if k % 2 else tokens for tokens in (z, x))
        weights = model.block_weights(k)
        sizes = weights.shape.native
        state = CpuEngine(weights, dtype=torch.float32).begin(z, Condition(case.y, guidance))
        embedding, schedule = state.cache.embedding, state.cache.guidance
        ends = [weights.proj_in_weight, weights.proj_in_bias, weights.position, weights.proj_out_weight]
        layers = [tensor for layer in weights.layers for tensor in vars(layer).values()]
        more = [each for each in (embedding, schedule) if each is not None]
        flags = [schedule is not None, "a" in guidance.what, "b" in guidance.what, embedding is not None]
        write(
            file,
            [*(int(sizes[name]) for name in SIZES), len(z), *map(int, flags)],
            [*ends, weights.proj_out_bias, *layers, torch.tensor([1 / guidance.attn_temp]), *more, z, x],
        )


if __name__ == "__main__":
    with open(sys.argv[1], "wb") as out:
        for each in GOLDEN:
            write_blocks(out, each)
