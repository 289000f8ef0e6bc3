"""The `triton` backend: a step of the token loop as a chain of fused kernels (`kernels/`), replayed as CUDA graphs.

The position is a number on the device, so that one graph of several tokens serves the whole sequence, and nothing waits
for the device until the block is done. In Triton's interpreter the same host code runs without graphs.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime._async_compile import AsyncCompileMode

from ..checks import short
from ..errors import ArgumentError, BackendError
from ..kernels.affine import Rule
from ..kernels.affine_step import Embedding, affine_step, embed
from ..kernels.cached_attention import cached_attention
from ..kernels.fixed_point_update import fixed_point_update
from ..kernels.launch import DTYPES, can_launch, dependent_launch, interpreting, recording
from ..kernels.norm_linear import Norm, norm_linear, norm_qkv
from . import triton_plan
from .contract import BlockState, Condition, Progress, embedding_rows
from .cuda_graph import capture, timed
from .triton_plan import Plan, Shape
from .triton_workspace import Pool, Size, Window, Workspace
from .weights import BlockWeights, LayerWeights

TOKENS_PER_GRAPH = 8  # long enough for the GPU that the next graph is launched meanwhile
MULTIPROCESSORS = 132  # assumed where there is no GPU to ask


def triton_missing(device: torch.device, dtype: torch.dtype = torch.float32, compile: bool = False) -> str | None:
    """Why this engine cannot serve such a request, with the mend, or None if it can."""
    if not can_launch(device):
        return f"Triton kernels need a CUDA device, and this is {device}; use device='cuda'"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0; use backend='torch'"
    if dtype not in DTYPES:
        return f"the Triton kernels have no {short(dtype)}; use float32, bfloat16 or float16, or backend='torch'"
    if compile:
        return "torch.compile has nothing to compile in the Triton engine; leave compile out, or use backend='torch'"
    return None


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


@contextmanager
def _on_device(device: torch.device, workspace: Workspace | None) -> Iterator[None]:
    with torch.cuda.device(device):
        try:
            yield
        finally:
            if workspace is not None:
                workspace.used = torch.cuda.Event()
                workspace.used.record()


class TritonEngine:
    """BlockEngine in Triton kernels. dtype: float32, bfloat16 or float16, of weights and KV cache.

    pool: shared by the engines of a model. pdl: programmatic dependent launch; default where the device has it.
    fp32 products are done in tf32 if torch.set_float32_matmul_precision says so when the engine is made.
    """

    def __init__(
        self,
        weights: BlockWeights,
        *,
        device: torch.device,
        dtype: torch.dtype,
        pool: Pool | None = None,
        pdl: bool | None = None,
    ):
        missing = triton_missing(device, dtype)
        if missing is not None:
            raise BackendError(missing)
        if pdl and not dependent_launch(device):
            raise BackendError(f"pdl=True cannot be had: {device} has no programmatic dependent launch")
        self.config, self.device, self.dtype = weights.config, device, dtype
        self.pool = Pool() if pool is None else pool
        self.pdl = dependent_launch(device) if pdl is None else pdl
        self.precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        self.setup_seconds = 0.0
        self.proj_in = self._linear(weights.proj_in_weight, weights.proj_in_bias)
        self.position = self._fp32(weights.position)
        self.classes = None if weights.classes is None else self._fp32(weights.classes)
        self.layers = [self._layer(layer) for layer in weights.layers]
        self.proj_out = self._linear(weights.proj_out_weight, weights.proj_out_bias)

    def _fp32(self, x: Tensor) -> Tensor:
        return x.detach().to(self.device, torch.float32).contiguous()

    def _linear(self, weight: Tensor, bias: Tensor) -> _Linear:
        return _Linear(weight.detach().to(self.device, self.dtype).contiguous(), self._fp32(bias))

    def _layer(self, w: LayerWeights) -> _Layer:
        return _Layer(
            norm1=(self._fp32(w.norm1_weight), self._fp32(w.norm1_bias)),
            qkv=self._linear(w.qkv_weight, w.qkv_bias),
            proj=self._linear(w.proj_weight, w.proj_bias),
            norm2=(self._fp32(w.norm2_weight), self._fp32(w.norm2_bias)),
            fc1=self._linear(w.fc1_weight, w.fc1_bias),
            fc2=self._linear(w.fc2_weight, w.fc2_bias),
        )

    def begin(self, z: Tensor, condition: Condition, spent: BlockState | None = None) -> BlockState:
        config, guidance = self.config, condition.guidance
        if z.dim() != 3 or tuple(z.shape[1:]) != (config.num_patches, config.token_dim):
            raise ArgumentError("z", f"shape (B, {config.num_patches}, {config.token_dim})", tuple(z.shape))
        B = z.shape[0]
        with self._on_device():
            z = z.detach().to(self.device, torch.float32).contiguous()
            size = Size(config, self.dtype, self.device, B, 2 if guidance.active else 1)
            workspace = self.pool.take(size, spent)
            if workspace.used is not None:
                torch.cuda.current_stream().wait_event(workspace.used)
            self._window(workspace, 1)
            workspace.z.copy_(z)
            workspace.scale.fill_(config.head_dim**-0.5)
            if guidance.active:
                workspace.scale[B:] = config.head_dim**-0.5 / guidance.attn_temp
                workspace.guidance.copy_(torch.tensor(guidance.schedule(z.shape[1]), dtype=torch.float32))
            if workspace.classes is not None and self.classes is not None:
                rows = embedding_rows(condition, B, config.num_classes, self.device)
                torch.index_select(self.classes, 0, rows, out=workspace.classes)
            state = BlockState(
                z=z,
                x=z.clone(),
                token_log_det=z.new_zeros(z.shape[:2]),
                condition=condition,
                cache=workspace,
                cache_bytes=workspace.keys_values.nbytes,
            )
        workspace.owner = weakref.ref(state)
        return state

    def bytes_per_sample(self, guided: bool) -> int:
        size = Size(self.config, self.dtype, self.device, 1, 2 if guided else 1)
        tokens = 2 * self.config.num_patches * (self.config.token_dim + 1) * 4  # z and x of the state
        return size.bytes + tokens

    @property
    def idle_bytes(self) -> int:
        return self.pool.idle_bytes

    @torch.no_grad()
    def reverse(self, state: BlockState, progress: Progress | None = None) -> None:
        workspace, rule = self._owned(state)
        T = self.config.num_patches
        with self._on_device(workspace):
            window = self._window(workspace, 1)
            workspace.x[:, 0] = state.x[:, 0]
            workspace.token_log_det.zero_()
            finite = torch.isfinite(workspace.x[:, 0]).all(-1)
            workspace.nonfinite.copy_(torch.where(finite, T, 0))
            workspace.position.zero_()
            self._embed(workspace, window, 1, rule.branches)
            done = 0
            while done < T - 1:
                tokens = min(TOKENS_PER_GRAPH, T - 1 - done)
                run = functools.partial(self._steps, workspace, window, rule, tokens)
                self._play(window, (rule.what, tokens), run)
                done += tokens
                if progress is not None:
                    progress(tokens)
            state.x.copy_(workspace.x)
            state.token_log_det.copy_(workspace.token_log_det)
            state.nonfinite = workspace.nonfinite.clone()

    @torch.no_grad()
    def fixed_point(self, state: BlockState, start: int, stop: int) -> Tensor:
        if not 1 <= start < stop <= self.config.num_patches:
            raise ArgumentError("start, stop", f"1 <= start < stop <= {self.config.num_patches}", (start, stop))
        workspace, rule = self._owned(state)
        with self._on_device(workspace):
            window = self._window(workspace, stop - start)
            workspace.x[:, start - 1 : stop] = state.x[:, start - 1 : stop]
            workspace.position.fill_(start - 1)
            self._play(window, rule.what, lambda: self._pass(workspace, window, rule, stop - start))
            state.x[:, start:stop] = workspace.x[:, start:stop]
            state.token_log_det[:, start:stop] = workspace.token_log_det[:, start:stop]
            state.nonfinite = None
            return window.change.clone()

    def _owned(self, state: BlockState) -> tuple[Workspace, Rule]:
        workspace = state.cache
        if not isinstance(workspace, Workspace) or workspace.owner() is not state:
            raise ArgumentError("state", "one whose memory was not handed on as `spent`", "another's")
        guidance = state.condition.guidance
        return workspace, Rule(self.config.nvp, workspace.guidance if guidance.active else None, guidance.what)

    def _on_device(self, workspace: Workspace | None = None) -> AbstractContextManager[Any]:
        """Launches go to this device; afterwards the point up to which the workspace is in use is marked."""
        return _on_device(self.device, workspace) if self.device.type == "cuda" else nullcontext()

    # One pass: the launches of a token step, or of a window.

    def _steps(self, workspace: Workspace, window: Window, rule: Rule, tokens: int) -> None:
        """So many tokens from workspace.position on, which is moved on."""
        for offset in range(tokens):
            self._transformer(workspace, window, offset, 1)
            affine_step(
                window.parameters, workspace.z, workspace.x, workspace.token_log_det, workspace.nonfinite, rule,
                self._embedding(workspace), window.h, workspace.position, tile=window.plan.step, offset=offset,
                precision=self.precision, pdl=self.pdl,
            )  # fmt: skip
        workspace.position.add_(tokens)

    def _pass(self, workspace: Workspace, window: Window, rule: Rule, tokens: int) -> None:
        self._embed(workspace, window, tokens, rule.branches)
        self._transformer(workspace, window, 0, tokens)
        fixed_point_update(
            window.parameters, workspace.z, workspace.x, workspace.token_log_det, window.change, rule,
            workspace.position, tile=window.plan.update, pdl=self.pdl,
        )  # fmt: skip

    def _embedding(self, workspace: Workspace) -> Embedding:
        return Embedding(self.proj_in.weight, self.proj_in.bias, self.position, workspace.classes)

    def _embed(self, workspace: Workspace, window: Window, tokens: int, branches: int) -> None:
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

    # Graphs and tiles.

    def _play(self, window: Window, key: Any, run: Callable[[], None]) -> None:
        """Run these launches: the first time one by one, which compiles what is not compiled, then as a CUDA graph."""
        if self.device.type != "cuda":
            run()
            return
        graphs = window.graphs.setdefault(self, {})
        started = time.perf_counter()
        if key not in graphs:
            graphs[key] = None
            run()
        else:
            if graphs[key] is None:
                graphs[key] = capture(run)
                self.setup_seconds += time.perf_counter() - started
            graphs[key].replay()
            return
        self.setup_seconds += time.perf_counter() - started

    def _window(self, workspace: Workspace, tokens: int) -> Window:
        return workspace.window(tokens, lambda: self._new_window(workspace, tokens))

    def _new_window(self, workspace: Workspace, tokens: int) -> Window:
        shape = self._shape(workspace.size, tokens)
        if interpreting():
            plan = triton_plan.interpreted(shape)
        elif self.device.type != "cuda" or tokens > 1:
            plan = triton_plan.first(triton_plan.candidates(shape))
        else:
            plan = self._tuned(workspace, shape)
        return Window(workspace.size, tokens, plan, shape.out_dim)

    def _shape(self, size: Size, tokens: int) -> Shape:
        config, multiprocessors = self.config, MULTIPROCESSORS
        if self.device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        return Shape(
            rows=size.rows * tokens,
            pairs=size.rows * config.num_heads,
            samples=size.batch * tokens,
            window=tokens,
            tokens=config.num_patches,
            channels=config.channels,
            token_dim=config.token_dim,
            out_dim=self.proj_out.weight.shape[0],
            head_dim=config.head_dim,
            dtype=self.dtype,
            multiprocessors=multiprocessors,
        )

    def _tuned(self, workspace: Workspace, shape: Shape) -> Plan:
        """The tiles of a token step: from disk, or the quickest in a step half way through the sequence."""
        device = {
            "gpu": torch.cuda.get_device_name(self.device),
            "triton": triton.__version__,
            "layers": self.config.layers_per_block,
            "branches": workspace.size.branches,
            "precision": self.precision,
            "pdl": self.pdl,
        }
        among = triton_plan.candidates(shape)
        found = triton_plan.read(shape, device)
        tokens = min(TOKENS_PER_GRAPH, self.config.num_patches - 1)
        if found is not None or tokens == 0:
            return found or triton_plan.first(among)
        started = time.perf_counter()
        rule = Rule(self.config.nvp, workspace.guidance if workspace.size.branches == 2 else None)

        def steps(plan: Plan) -> Callable[[], None]:
            window = Window(workspace.size, 1, plan, shape.out_dim)
            return lambda: self._steps(workspace, window, rule, tokens)

        def seconds(plan: Plan) -> float | None:
            return timed(steps(plan), lambda: workspace.position.fill_((self.config.num_patches - tokens) // 2))

        begin = triton_plan.first(among)
        with AsyncCompileMode(ThreadPoolExecutor()), recording() as launches:
            for plan in (replace(begin, **{name: tile}) for name, tiles in among.items() for tile in tiles):
                steps(plan)()
                for launch in launches:
                    launch.compile()
                launches.clear()
        plan = triton_plan.tune(among, seconds)
        triton_plan.write(shape, device, plan)
        self.setup_seconds += time.perf_counter() - started
        return plan
