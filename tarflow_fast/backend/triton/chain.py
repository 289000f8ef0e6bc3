"""One pass of a flow block as a chain of kernels: a step of the token loop, or a window of the parallel solver.

A step of L layers is 5 L + 2 launches: norm and qkv, attention, projection, norm and fc1, fc2; then proj_out, and the
affine step, which ends with the embedding of the next token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...engine.weights import BlockWeights, LayerWeights
from ...kernels.affine import Rule
from ...kernels.affine_step import Embedding, affine_step, embed
from ...kernels.cached_attention import cached_attention
from ...kernels.fixed_point_update import fixed_point_update
from ...kernels.launch import Launch, recording
from ...kernels.norm_linear import Norm, norm_linear, norm_qkv
from .workspace import Window, Workspace

LAYER = ("qkv", "attention", "proj", "fc1", "fc2")
END = ("proj_out", "affine_step")


class Operation(NamedTuple):
    """One of the launches of a step. bytes: what it must at least read or write of weights, keys and values."""

    name: str
    run: Launch
    bytes: int


@dataclass(frozen=True)
class _Linear:
    weight: Tensor  # (N, K), in the engine's dtype
    bias: Tensor  # (N,) fp32


@dataclass(frozen=True)
class _Layer:
    norm1: Norm
    qkv: _Linear
    proj: _Linear
    norm2: Norm
    fc1: _Linear
    fc2: _Linear


class Chain:
    """The packed weights of a flow block, and the launches of its passes. precision, pdl: see `TritonEngine`."""

    def __init__(self, weights: BlockWeights, device: torch.device, dtype: torch.dtype, precision: str, pdl: bool):
        self.nvp, self.device, self.dtype = weights.shape.affine, device, dtype
        self.precision, self.pdl = precision, pdl
        self.proj_in = self._linear(weights.proj_in_weight, weights.proj_in_bias)
        self.position = self._fp32(weights.position)
        self.classes = None if weights.classes is None else self._fp32(weights.classes)
        self.layers = [self._layer(layer) for layer in weights.layers]
        self.proj_out = self._linear(weights.proj_out_weight, weights.proj_out_bias)

    def _fp32(self, x: Tensor) -> Tensor:
        return x.detach().to(self.device, torch.float32, copy=True).contiguous()

    def _linear(self, weight: Tensor, bias: Tensor) -> _Linear:
        return _Linear(weight.detach().to(self.device, self.dtype, copy=True).contiguous(), self._fp32(bias))

    def _layer(self, w: LayerWeights) -> _Layer:
        return _Layer(
            norm1=(self._fp32(w.norm1_weight), self._fp32(w.norm1_bias)),
            qkv=self._linear(w.qkv_weight, w.qkv_bias),
            proj=self._linear(w.proj_weight, w.proj_bias),
            norm2=(self._fp32(w.norm2_weight), self._fp32(w.norm2_bias)),
            fc1=self._linear(w.fc1_weight, w.fc1_bias),
            fc2=self._linear(w.fc2_weight, w.fc2_bias),
        )

    def steps(self, workspace: Workspace, window: Window, rule: Rule, tokens: int) -> None:
        """So many tokens from workspace.position on, which is moved on."""
        for offset in range(tokens):
            self._transformer(workspace, window, offset, 1)
            affine_step(
                window.parameters, workspace.z, workspace.x, workspace.token_log_det, workspace.nonfinite, rule,
                self._embedding(workspace), window.h, workspace.position, tile=window.plan.step, offset=offset,
                precision=self.precision, pdl=self.pdl,
            )  # fmt: skip
        workspace.position.add_(tokens)

    def window_pass(self, workspace: Workspace, window: Window, rule: Rule, tokens: int) -> None:
        self.embed(workspace, window, tokens, rule.branches)
        self._transformer(workspace, window, 0, tokens)
        fixed_point_update(
            window.parameters, workspace.z, workspace.x, workspace.token_log_det, window.change, window.residual, rule,
            workspace.position, tile=window.plan.update, pdl=self.pdl,
        )  # fmt: skip

    def _embedding(self, workspace: Workspace) -> Embedding:
        return Embedding(self.proj_in.weight, self.proj_in.bias, self.position, workspace.classes)

    def embed(self, workspace: Workspace, window: Window, tokens: int, branches: int) -> None:
        embed(
            workspace.x, self._embedding(workspace), window.h, workspace.position, tile=window.plan.step,
            branches=branches, window=tokens, precision=self.precision, pdl=self.pdl,
        )  # fmt: skip

    def _transformer(self, workspace: Workspace, window: Window, offset: int, tokens: int) -> None:
        """From window.h to window.parameters, with keys and values of these tokens into the cache."""
        plan, h = window.plan, window.h
        options: dict[str, Any] = {"scratch": window.scratch, "precision": self.precision, "pdl": self.pdl}
        where: dict[str, Any] = {"offset": offset, "window": tokens, **options}
        for layer, (keys, values) in zip(self.layers, workspace.keys_values, strict=True):
            norm_qkv(
                h, layer.qkv.weight, layer.qkv.bias, layer.norm1, window.queries, keys, values, workspace.position,
                tile=plan.qkv, **where,
            )  # fmt: skip
            cached_attention(
                window.queries, keys, values, window.attended, workspace.scale, workspace.position,
                tile=plan.attention, **where,
            )  # fmt: skip
            norm_linear(
                window.attended, layer.proj.weight, layer.proj.bias, h, tile=plan.proj, epilogue="add", **options
            )
            norm_linear(
                h, layer.fc1.weight, layer.fc1.bias, window.hidden, tile=plan.fc1, norm=layer.norm2, epilogue="gelu",
                **options,
            )  # fmt: skip
            norm_linear(window.hidden, layer.fc2.weight, layer.fc2.bias, h, tile=plan.fc2, epilogue="add", **options)
        norm_linear(h, self.proj_out.weight, self.proj_out.bias, window.parameters, tile=plan.proj_out, **options)

    def operations(self, workspace: Workspace, window: Window, rule: Rule, position: int) -> list[Operation]:
        """The launches of a step at this position, in their order."""
        with recording() as launches:
            self.steps(workspace, window, rule, 1)
        workspace.position.fill_(position)
        layer, size = self.layers[0], workspace.size
        matrices = {
            "qkv": layer.qkv, "proj": layer.proj, "fc1": layer.fc1, "fc2": layer.fc2, "proj_out": self.proj_out,
            "affine_step": self.proj_in,
        }  # fmt: skip
        moved = {name: linear.weight.nbytes for name, linear in matrices.items()}
        token = 2 * size.rows * size.shape.channels * self.dtype.itemsize  # one token's keys and values
        moved["qkv"] += token
        moved["attention"] = token * (position + 1)
        names = LAYER * len(self.layers) + END
        return [Operation(name, run, moved[name]) for name, run in zip(names, launches, strict=True)]
