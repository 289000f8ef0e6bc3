"""The `triton` backend: a step of the token loop as a chain of fused kernels (`kernels/`), replayed as CUDA graphs.

The position is a number on the device, so that one graph of several tokens serves the whole sequence, and nothing waits
for the device until the block is done. In Triton's interpreter the same host code runs without graphs.
"""

from __future__ import annotations

import functools
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from ...cache import CACHE_VARIABLE
from ...engine.base import EngineBase
from ...engine.contract import BlockState, Condition, Moved, Progress, embedding_rows
from ...engine.gpu import gpu_missing
from ...engine.weights import BlockWeights
from ...engine.windows import Bounds, check_part, check_window
from ...errors import ArgumentError, BackendError
from ...kernels.affine import Rule
from ...kernels.launch import Launch, can_launch, dependent_launch, interpreting, recording
from . import plan as triton_plan
from .chain import END, LAYER, Chain, Operation
from .graph import CaptureError, capture, timed
from .plan import Candidates, PassShape, Plan
from .workspace import Pool, Size, Window, Workspace, widened

TOKENS_PER_GRAPH = 8  # enough work for the GPU while the next graph is launched
MULTIPROCESSORS = 132  # assumed where there is no GPU


def triton_missing(device: torch.device, dtype: torch.dtype = torch.float32, compile: bool = False) -> str | None:
    """Returns why this engine cannot serve such a request, and what would mend that, or None if it can."""
    return gpu_missing("the Triton engine", can_launch(device), device, dtype, compile)


@contextmanager
def _on_device(device: torch.device, workspace: Workspace | None) -> Iterator[None]:
    with torch.cuda.device(device):
        try:
            yield
        finally:
            if workspace is not None:
                workspace.used = torch.cuda.Event()
                workspace.used.record()


class TritonEngine(EngineBase):
    """A BlockEngine in Triton kernels.

    dtype: the dtype of weights and KV cache, float32, bfloat16 or float16. pool: the workspaces that the engines of a
    model share; default a pool of its own. pdl: whether kernels use programmatic dependent launch, by default where the
    device has it. On the device "meta" nothing can run, but `possible_launches` can be had. Products of fp32 are done
    in tf32 if torch.set_float32_matmul_precision says so when the engine is made.
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
        if pdl and not dependent_launch(device) and device.type != "meta":
            raise BackendError(f"pdl=True cannot be had: {device} has no programmatic dependent launch")
        self.shape, self.device, self.dtype = weights.shape, device, dtype
        self.pool = Pool() if pool is None else pool
        self.pdl = dependent_launch(device) if pdl is None else pdl
        self.precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        self._seconds = 0.0
        self.chain = Chain(weights, device, dtype, self.precision, self.pdl)

    def begin(self, z: Tensor, condition: Condition, reuse: BlockState | None = None) -> BlockState:
        shape, guidance = self.shape, condition.guidance
        B = z.shape[0]
        with self._on_device():
            z = self.latents(z, torch.float32)
            size = Size(shape, self.dtype, self.device, B, self.branches(condition))
            workspace = self.pool.take(size, reuse)
            if workspace.used is not None:
                torch.cuda.current_stream().wait_event(workspace.used)
            self._window(workspace, 1)
            for window in workspace.windows.values():  # a launch that was broken off leaves its counters as they were
                window.scratch.arrived.zero_()
            workspace.z.copy_(z)
            workspace.scale.fill_(shape.head_dim**-0.5)
            if guidance.active:
                workspace.scale[B:] = shape.head_dim**-0.5 / guidance.attn_temp
                workspace.guidance.copy_(torch.tensor(guidance.schedule(z.shape[1]), dtype=torch.float32, device="cpu"))
            if workspace.classes is not None and self.chain.classes is not None:
                rows = embedding_rows(condition, B, shape.classes, self.device)
                torch.index_select(self.chain.classes, 0, rows, out=workspace.classes)
            state = self.state(z, z.clone(), condition, workspace, workspace.keys_values.nbytes)
        workspace.owner = weakref.ref(state)
        return state

    def bytes_per_sample(self, guided: bool) -> int:
        size = Size(self.shape, self.dtype, self.device, 1, 2 if guided else 1)
        tokens = 2 * self.shape.tokens * (self.shape.token_dim + 1) * 4  # the state's z and x
        return size.bytes + tokens

    @property
    def setup_seconds(self) -> float:
        return self._seconds

    @property
    def cached_bytes(self) -> int:
        return self.pool.cached_bytes

    def empty_cache(self) -> None:
        self.pool.empty_cache()

    @torch.no_grad()
    def reverse(
        self, state: BlockState, progress: Progress | None = None, start: int = 1, stop: int | None = None
    ) -> None:
        T = self.shape.tokens
        stop = T if stop is None else stop
        check_part(start, stop, T)
        workspace, rule = self._owned(state)
        with self._on_device(workspace):
            window = self._window(workspace, 1)
            workspace.x[:, start - 1] = state.x[:, start - 1]
            finite = torch.isfinite(state.x[:, :start]).all(-1)
            workspace.nonfinite.copy_(torch.where(finite.all(1), T, finite.int().argmin(1)))
            workspace.position.fill_(start - 1)
            self.chain.embed(workspace, window, 1, rule.branches)
            at = start
            while at < stop:
                tokens = min(TOKENS_PER_GRAPH, stop - at)
                run = functools.partial(self.chain.steps, workspace, window, rule, tokens)
                self._play(window, (rule.what, tokens), run)
                at += tokens
                if progress is not None:
                    progress(tokens)
            self._copy_back(state, start, stop)
            state.nonfinite = workspace.nonfinite.clone() if stop == T else None

    @torch.no_grad()
    def fixed_point(self, state: BlockState, start: Bounds, stop: Bounds) -> Moved:
        T = self.shape.tokens
        start, stop = check_window(start, stop, T)
        workspace, rule = self._owned(state)
        first, last = widened(start, stop, T)
        with self._on_device(workspace):
            window = self._window(workspace, last - first)
            # Tokens that are there only for the width are copied too, as the pass before this one updated them.
            workspace.x[:, first - 1 : last] = state.x[:, first - 1 : last]
            workspace.position.fill_(first - 1)
            self._play(window, rule.what, lambda: self.chain.window_pass(workspace, window, rule, last - first))
            self._copy_back(state, start, stop)
            state.nonfinite = None
            wanted = slice(start - first, stop - first)
            return Moved(window.change[:, wanted].clone(), window.residual[:, wanted].clone())

    def _copy_back(self, state: BlockState, start: int, stop: int) -> None:
        state.x[:, start:stop] = state.cache.x[:, start:stop]
        state.token_log_det[:, start:stop] = state.cache.token_log_det[:, start:stop]

    def _owned(self, state: BlockState) -> tuple[Workspace, Rule]:
        workspace = state.cache
        if not isinstance(workspace, Workspace) or workspace.owner() is not state:
            raise ArgumentError("state", "one whose memory was not handed on as `reuse`", "another's")
        guidance = state.condition.guidance
        return workspace, Rule(self.shape.affine, workspace.guidance if guidance.active else None, guidance.what)

    def _on_device(self, workspace: Workspace | None = None) -> AbstractContextManager[Any]:
        """Direct launches to this device, and mark afterwards the point up to which the workspace is in use."""
        return _on_device(self.device, workspace) if self.device.type == "cuda" else nullcontext()

    # Graphs and tiles.

    def _play(self, window: Window, key: Any, run: Callable[[], None]) -> None:
        """Run these launches, the first time one by one, which compiles them where needed, and then as a CUDA graph."""
        if self.device.type != "cuda":
            run()
            return
        graphs = window.graphs.setdefault(self, {})
        key = (key, self.pdl)
        started = time.perf_counter()
        if key not in graphs:
            run()
            graphs[key] = None
        elif graphs[key] is not None:
            graphs[key].replay()
            return
        else:
            try:
                graphs[key] = capture(run)
            except CaptureError:
                self._without_pdl()
                self._play(window, key[0], run)
                return
            graphs[key].replay()
        self._seconds += time.perf_counter() - started

    def _without_pdl(self) -> None:
        """Goes on without dependent launch after a capture that failed: drivers before CUDA 12.3 cannot capture it.

        It is called where that error is handled, and raises it again if launches were not dependent anyway.
        """
        if not self.pdl:
            raise
        self.pdl = self.chain.pdl = False

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

    # What follows is for the bench, and for checks that need no GPU.

    @property
    def launches_per_token(self) -> int:
        """Returns the number of launches of a step."""
        return len(LAYER) * self.shape.layers + len(END)

    def operations(self, state: BlockState) -> list[Operation]:
        """Returns the launches of a step three quarters through the sequence, in order, with the state's buffers."""
        workspace, rule = self._owned(state)
        position = 3 * (self.shape.tokens - 1) // 4
        with self._on_device(workspace):
            return self.chain.operations(workspace, self._window(workspace, 1), rule, position)

    def possible_launches(self, state: BlockState, tokens: int = 1, *, every: bool = True) -> list[Launch]:
        """Returns every launch that a pass over so many tokens may consist of.

        every: whether to take all tiles that there are to choose from, or only those of first choice.
        """
        workspace, rule = self._owned(state)
        shape = self._shape(workspace.size, tokens)
        among = triton_plan.candidates(shape)
        return self._launches(workspace, rule, shape, among if every else {n: t[:1] for n, t in among.items()})

    def _launches(self, workspace: Workspace, rule: Rule, shape: PassShape, among: Candidates) -> list[Launch]:
        begin = triton_plan.first(among)
        with recording() as launches:
            for plan in (replace(begin, **{name: tile}) for name, tiles in among.items() for tile in tiles):
                window = Window(workspace.size, shape.window, plan, shape.out_dim)
                if shape.window == 1:
                    self.chain.embed(workspace, window, 1, rule.branches)
                    self.chain.steps(workspace, window, rule, 1)
                else:
                    self.chain.window_pass(workspace, window, rule, shape.window)
        return launches

    def _shape(self, size: Size, tokens: int) -> PassShape:
        """Returns the shape of a pass.

        Batches between two powers of two have the same one, and so share a choice of tiles.
        """
        shape, multiprocessors = self.shape, MULTIPROCESSORS
        batch = triton.next_power_of_2(size.batch)
        if self.device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        return PassShape(
            rows=batch * size.branches * tokens,
            pairs=batch * size.branches * shape.heads,
            samples=batch * tokens,
            window=tokens,
            tokens=shape.tokens,
            channels=shape.channels,
            hidden=shape.hidden,
            token_dim=shape.token_dim,
            out_dim=self.chain.proj_out.weight.shape[0],
            head_dim=shape.head_dim,
            dtype=self.dtype,
            multiprocessors=multiprocessors,
        )

    def _tuned(self, workspace: Workspace, shape: PassShape) -> Plan:
        """Returns the tiles of a token step: from disk, or else the quickest in a step half way through the block."""
        device = {
            "gpu": torch.cuda.get_device_name(self.device),
            "triton": triton.__version__,
            "layers": self.shape.layers,
            "branches": workspace.size.branches,
            "precision": self.precision,
            "pdl": dependent_launch(self.device),  # also of an engine without: with the same tiles it has the same bits
        }
        among = triton_plan.candidates(shape)
        found = triton_plan.read(shape, device)
        tokens = min(TOKENS_PER_GRAPH, self.shape.tokens - 1)
        if found is not None or tokens == 0:
            return found or triton_plan.first(among)
        started = time.perf_counter()
        rule = Rule(self.shape.affine, workspace.guidance if workspace.size.branches == 2 else None)

        def steps(plan: Plan) -> Callable[[], None]:
            window = Window(workspace.size, 1, plan, shape.out_dim)
            return lambda: self.chain.steps(workspace, window, rule, tokens)

        def seconds(plan: Plan) -> float | None:
            return timed(steps(plan), lambda: workspace.position.fill_((self.shape.tokens - tokens) // 2))

        launches = self._launches(workspace, rule, shape, among)
        kernels = {(each.kernel.__name__, repr(each.constants), each.warps): each for each in launches}  # each once
        # A kernel that does not compile is compiled again when it is launched, and fails there. An error that left this
        # context would leave the asynchronous mode switched on.
        with ThreadPoolExecutor() as workers, triton.AsyncCompileMode(workers, ignore_errors=True):
            for launch in kernels.values():
                launch.compile()
        try:
            plan = triton_plan.tune(among, seconds)
        except CaptureError:
            self._without_pdl()
            return self._tuned(workspace, shape)
        try:
            triton_plan.write(shape, device, plan)
        except OSError as error:
            warnings.warn(
                f"the choice of tiles could not be kept and will be made again by the next process: {error}; "
                f"set {CACHE_VARIABLE} to a folder that can be written",
                stacklevel=2,
            )
        self._seconds += time.perf_counter() - started
        return plan
