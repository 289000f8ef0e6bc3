"""The `cuda` backend: all steps of a flow block's pass in one launch of one kernel (`csrc/cuda/`).

A row is a token of a sample, or of its unguided branch, that is evaluated. A launch takes at most 64 rows, and more are
divided among several launches. Weights and KV cache have the chosen dtype, and all else is fp32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...checks import short
from ...engine.base import EngineBase
from ...engine.contract import (
    BlockState,
    Condition,
    Converged,
    Moved,
    PassTrail,
    Progress,
    check_plain,
    embedding_rows,
)
from ...engine.gpu import gpu_missing
from ...engine.weights import BlockWeights
from ...engine.windows import Bounds, check_part, check_window, check_windows
from ...errors import ArgumentError, BackendError
from ...native import address
from .pack import TILE, pack
from .plan import (
    MOST_HALVINGS,
    MOST_ROWS,
    NORMED_ROWS,
    TILE_ROWS,
    Division,
    Plan,
    attends_together,
    count_tiles,
    early_keys,
    grid_blocks,
    make_division,
    make_plan,
    most_of_division,
    whole,
)

SEQUENTIAL, FIXED_POINT, FRONTIER = 0, 1, 2  # `Mode` in params.h
WEIGHT_BUFFERS = ("weights", "hidden", "attended", "norms", "keys_values")  # these have the dtype of the weights
INT32_BUFFERS = ("work", "jobs", "reached", "evaluations", "passes", "barrier")  # all others are fp32, see params.h
PHASES = ("embed", "qkv", "attention", "proj", "fc1", "fc2", "proj_out")
"""The kernel's phases: `Phase` in params.h, in its order."""
Positions = list[tuple[int, int, int]]  # for each row of a branch: sample, token to evaluate, column of `Moved`


def load_native() -> ModuleType:
    """Returns the compiled module. Raises BackendError, which says what to install, where it was not built."""
    try:
        return import_module("tarflow_fast._cuda")
    except ImportError as error:
        raise BackendError(
            "the CUDA engine was not built; install the CUDA toolkit (nvcc, 12.8 or later, on the PATH or under "
            "CUDA_HOME) and install tarflow_fast again, with TARFLOW_FAST_CUDA=1 where the build sees no GPU "
            f"({error})"
        ) from error


def native_missing() -> str | None:
    """Returns why there is no compiled module, and what would mend that, or None if there is one."""
    try:
        load_native()
    except BackendError as error:
        return str(error)
    return None


@functools.cache
def probe_missing(native: ModuleType, index: int) -> str | None:
    """Returns why kernels of this build cannot run on this device, and what would mend that, or None if they can.

    The compiled module is asked, whose CUDA runtime is its own: the driver may serve torch's and be too old for it.
    """
    try:
        native.probe(index=index)
    except RuntimeError as error:
        return f"{error}; backend='triton' and 'torch' do without it"
    return None


def cuda_missing(device: torch.device, dtype: torch.dtype = torch.float32, compile: bool = False) -> str | None:
    """Returns why this engine cannot serve such a request, and what would mend that, or None if it can."""
    missing = native_missing()
    if missing is not None:
        return missing
    native = load_native()
    missing = gpu_missing("the CUDA engine", device.type == native.device_type, device, dtype, compile)
    return missing or probe_missing(native, _index(device))


def _index(device: torch.device) -> int:
    """Returns the number of a CUDA device; the emulated one is 0."""
    index: int | None = device.index
    if index is None:
        return torch.cuda.current_device() if device.type == "cuda" else 0
    return index


def _l2_bytes(device: torch.device) -> int:
    """Returns the size of the cache that all multiprocessors share; that of an H100 in the emulation."""
    if device.type != "cuda":
        return 50 << 20
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return size


def head_dim_missing(head_dim: int, dtype: torch.dtype) -> str | None:
    """Returns why this engine cannot take heads of this width, and what would mend that, or None if it can.

    A key is read by lanes that take 16 bytes each, or one element each where a head is not a whole number of 16 bytes,
    and it has at most the 32 lanes of a warp.
    """
    lane = 16 // dtype.itemsize
    if head_dim <= 32 or (head_dim % lane == 0 and head_dim <= 32 * lane):
        return None
    return (
        f"the CUDA engine takes heads of at most 32 channels, or in {short(dtype)} multiples of {lane} up to "
        f"{32 * lane}, and this model has {head_dim}; use backend='triton'"
    )


class _Workspace:
    """The memory that a state holds on the device.

    buffers: tensors by the kernel's names and in its shapes (see params.h), which are also attributes.
    """

    def __init__(self, buffers: dict[str, Tensor | None]):
        self.buffers = buffers
        self.launch: Any = None  # the native launch with these buffers, from the engine that made them

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["buffers"][name]
        except KeyError:
            raise AttributeError(name) from None


class CudaEngine(EngineBase):
    """A BlockEngine in one CUDA kernel. dtype: the dtype of weights and KV cache, float32, bfloat16 or float16."""

    ragged = True  # each sample may have a window of its own

    def __init__(self, weights: BlockWeights, *, device: torch.device, dtype: torch.dtype):
        missing = cuda_missing(device, dtype) or head_dim_missing(weights.shape.head_dim, dtype)
        if missing is not None:
            raise BackendError(missing)
        self.shape, self.device, self.dtype = weights.shape, device, dtype
        self._native = load_native()
        self._index = _index(device)
        self._dtype_name = str(dtype).removeprefix("torch.")
        with self._on_device():
            multiprocessors, self._shared_bytes = self._native.device(index=self._index)
            self.blocks = grid_blocks(self.shape, multiprocessors)
            self._early_keys = early_keys(self.shape, dtype, self.blocks, _l2_bytes(device))
            self._divisions = {n: make_division(self.shape, n, self.blocks, device) for n in MOST_HALVINGS}
            self._weights, self._biases = pack(weights, device, dtype)
            self._position = self._fp32(weights.position)
            self._classes = None if weights.classes is None else self._fp32(weights.classes)
        self._plans: dict[tuple[int, int, int], Plan] = {}
        # The most parts of the attention in any launch. Planning them all also shows that each fits in shared memory.
        alone = max(n * self.plan(n).splits for n in range(1, MOST_ROWS + 1))
        together = 0
        if attends_together(self.shape, dtype):  # in tiles of 8 rows at least
            rows_of = {tiles: min(tiles * TILE_ROWS, MOST_ROWS) for tiles in range(1, MOST_ROWS // 8 + 1)}
            together = max(rows * self.plan(rows, tiles).splits for tiles, rows in rows_of.items())
        self._most_parts = max(alone, together) * self.shape.heads

    def _division(self, rows: int) -> Division:
        return self._divisions[most_of_division(rows)]

    def plan(self, rows: int, tiles: int = 0, branches: int = 1) -> Plan:
        """Returns how a launch of so many rows is divided.

        Raises BackendError where the model is too wide for the kernel.

        rows: all rows. tiles: those of one branch in which rows attend together (see `count_tiles`). branches: 1 or 2.
        """
        key = (rows, tiles, branches)
        if key not in self._plans:
            instances = self._native.instances()
            most_rows, warps = next((n, w) for name, n, w in instances if name == self._dtype_name and n >= rows)
            self._plans[key] = make_plan(
                self.shape,
                self.dtype,
                rows=rows,
                tiles=tiles,
                branches=branches,
                most_rows=most_rows,
                warps=warps,
                jobs=self._division(rows).jobs.shape[1],
                block_tiles=self._division(rows).most_tiles,
                blocks=self._division(rows).blocks,
                shared_bytes=self._shared_bytes,
            )
        return self._plans[key]

    def begin(self, z: Tensor, condition: Condition, reuse: BlockState | None = None) -> BlockState:
        z = self.latents(z, torch.float32)
        with self._on_device():
            workspace = self._workspace(z.shape[0], condition, reuse)
            return self.state(z, z.clone(), condition, workspace, workspace.keys_values.nbytes)

    def bytes_per_sample(self, guided: bool) -> int:
        shape = self.shape
        row = 2 * shape.layers * shape.tokens * shape.channels * self.dtype.itemsize
        tokens = 3 * shape.tokens * (shape.token_dim + 1) * 4  # the state's z and x, and a copy in a pass
        return (2 if guided else 1) * (row + 4 * shape.channels) + tokens

    @torch.no_grad()
    def reverse(
        self, state: BlockState, progress: Progress | None = None, start: int = 1, stop: int | None = None
    ) -> None:
        B, T, _ = state.x.shape
        stop = T if stop is None else stop
        check_part(start, stop, T)
        state.nonfinite = None
        if start == stop:
            return
        for samples in self._groups(list(range(B)), self._most_rows(state)):
            positions = [(sample, 0, 0) for sample in samples]
            self._run(state, positions, {"input": state.x}, mode=SEQUENTIAL, start=start, stop=stop)
        if progress is not None:
            progress(stop - start)

    @torch.no_grad()
    def fixed_point(self, state: BlockState, start: Bounds, stop: Bounds) -> Moved:
        B, T, _ = state.x.shape
        if isinstance(start, int) or isinstance(stop, int):
            first, end = check_window(start, stop, T)
            start, stop = [first] * B, [end] * B
        starts, stops = check_windows(start, stop, B, T)
        # The tokens of a sample stay in their order, so that a launch finds the keys of those before it in the cache.
        rows = [(b, starts[b] - 1 + j, j) for b in range(B) for j in range(stops[b] - starts[b])]
        widest = max((column for _, _, column in rows), default=-1) + 1
        moved = Moved(*(state.x.new_zeros(B, widest) for _ in Moved._fields))
        state.nonfinite = None
        buffers = {"input": state.x.clone(), "change": moved.change, "residual": moved.residual}
        for positions in self._groups(rows, self._most_rows(state)):
            self._run(state, positions, buffers, mode=FIXED_POINT)
        return moved

    # What follows is for the bench.

    @contextmanager
    def without_phases(self, state: BlockState, phases: int) -> Iterator[None]:
        """Within this context passes over this state leave out some of the kernel's phases, so that their time can be
        measured; what such a pass computes is garbage. phases: a bit for each of PHASES."""
        state.cache.launch.set_size("skip_phases", phases)
        try:
            yield
        finally:
            state.cache.launch.set_size("skip_phases", 0)  # else it stays for all later passes

    def passes_without(self, state: BlockState) -> dict[str, Callable[[], None]]:
        """Returns passes over this state, by what they leave out: "" for nothing, each of PHASES, and "all" of them."""

        def run(phases: int) -> None:
            with self.without_phases(state, phases):
                self.reverse(state)

        left_out = {"": 0, **{name: 1 << bit for bit, name in enumerate(PHASES)}, "all": 2 ** len(PHASES) - 1}
        return {name: functools.partial(run, phases) for name, phases in left_out.items()}

    def barriers(self, batch: int, branches: int) -> list[int]:
        """Returns how many barriers of the grid a token takes in each launch of a sequential pass."""
        rows = [len(samples) * branches for samples in self._groups(list(range(batch)), MOST_ROWS // branches)]
        L = self.shape.layers
        return [(5 + self.plan(n).merges if n <= NORMED_ROWS else 1) * L + 2 for n in rows]

    def max_window(self, state: BlockState) -> int:
        return self._most_rows(state)

    @torch.no_grad()
    def iterate_on_device(
        self,
        state: BlockState,
        guess: Tensor,
        reached: Sequence[int],
        trail: PassTrail,
        *,
        window: int,
        max_passes: int,
    ) -> Converged:
        B = state.x.shape[0]
        if not 1 <= window <= self.max_window(state):
            raise ArgumentError("window", f"1 to {self.max_window(state)}", window)
        if tuple(guess.shape) != tuple(state.x.shape):
            raise ArgumentError("guess", f"shape {tuple(state.x.shape)}", tuple(guess.shape))
        values, shape = trail.values, (4, *state.x.shape[:2])
        if tuple(values.shape) != shape or values.dtype != torch.float32 or not values.is_contiguous():
            raise ArgumentError("trail", f"a contiguous float32 tensor {shape}", tuple(values.shape))
        groups = list(self._groups(list(range(B)), self._most_rows(state) // window))
        numbers = torch.zeros(2 * B + len(groups), dtype=torch.int32, device="cpu")
        numbers[:B] = torch.tensor(reached, dtype=torch.int32, device="cpu")
        numbers = numbers.to(self.device)
        fronts, evaluations, passes = numbers.split([B, B, len(groups)])
        residual = state.x.new_zeros(B)
        state.nonfinite = None
        state.cache.launch.set_tol(trail.tol, trail.stream, trail.rounding)
        for i, samples in enumerate(groups):
            buffers = {
                "input": state.x,
                "guess": guess.contiguous(),
                "residual": residual,
                "reached": fronts,
                "evaluations": evaluations,
                "trail": values,
                "passes": passes[i : i + 1],
            }
            positions = [(sample, 0, column) for sample in samples for column in range(window)]
            self._run(state, positions, buffers, mode=FRONTIER, window=window, max_passes=max_passes)
        counts = numbers.tolist()
        return Converged(max(counts[2 * B :], default=0), counts[:B], sum(counts[B : 2 * B]), residual)

    # The parts of a launch.

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _fp32(self, x: Tensor) -> Tensor:
        return x.detach().to(self.device, torch.float32, copy=True).contiguous()

    def _most_rows(self, state: BlockState) -> int:
        """Returns the most rows of one branch that a launch can take."""
        return MOST_ROWS // self.branches(state.condition)

    @staticmethod
    def _groups(rows: list[Any], most: int) -> Iterator[list[Any]]:
        """Divide the rows into as few groups of at most `most` as can be, of about the same size."""
        count = math.ceil(len(rows) / most)
        for i in range(count):
            yield rows[len(rows) * i // count : len(rows) * (i + 1) // count]

    def _workspace(self, batch: int, condition: Condition, reuse: BlockState | None) -> _Workspace:
        shape, guidance = self.shape, condition.guidance
        branches = self.branches(condition)
        R = branches * batch
        L, H, T, d = shape.layers, shape.heads, shape.tokens, shape.head_dim
        old = reuse.cache if reuse is not None else None
        sizes = (L, 2, R, H, T, d)
        if isinstance(old, _Workspace) and old.keys_values.shape == sizes and old.keys_values.dtype == self.dtype:
            keys_values = old.keys_values
        else:
            keys_values = torch.empty(sizes, dtype=self.dtype, device=self.device)

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=self.device)

        scale = torch.full((branches,), d**-0.5 * math.log2(math.e), dtype=torch.float32, device="cpu")
        if guidance.active:
            scale[1] /= guidance.attn_temp
        classes = schedule = None
        if self._classes is not None:
            classes = self._classes[embedding_rows(condition, batch, shape.classes, self.device)]
        if guidance.active:
            schedule = torch.tensor(guidance.schedule(T), dtype=torch.float32, device=self.device)
        C, out = whole(shape.channels, TILE), whole(shape.parameters, TILE)
        workspace = _Workspace(
            {
                "keys_values": keys_values,
                "h": empty(MOST_ROWS, C),
                "rest": empty(2, 2 ** max(MOST_HALVINGS.values()), MOST_ROWS, C),
                "queries": empty(2, MOST_ROWS, C),
                "partials": empty(whole(self._most_parts * d, 4) + 2 * whole(self._most_parts * 2, 4)),
                "hidden": empty(2, MOST_ROWS, whole(shape.hidden, TILE), dtype=self.dtype),
                "attended": empty(2, MOST_ROWS, C, dtype=self.dtype),
                "norms": empty(4, MOST_ROWS, C, dtype=self.dtype),
                "parameters": empty(MOST_ROWS, out),
                "barrier": torch.zeros(1, dtype=torch.int32, device=self.device),
                "class_rows": classes,
                "guidance": schedule,
                "scale": scale.to(self.device),
            }
        )
        workspace.launch = self._launch(workspace, batch, condition)
        return workspace

    def _launch(self, workspace: _Workspace, batch: int, condition: Condition) -> Any:
        shape, guidance = self.shape, condition.guidance
        launch = self._native.Launch()
        sizes = {
            "channels": shape.channels,
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "hidden_dim": shape.hidden,
            "tokens": shape.tokens,
            "token_dim": shape.token_dim,
            "out_dim": shape.parameters,
            "layers": shape.layers,
            "affine": shape.affine,
            "branches": self.branches(condition),
            "samples": batch,
            "guide_a": guidance.active and "a" in guidance.what,
            "guide_b": guidance.active and "b" in guidance.what,
        }
        for name, value in sizes.items():
            launch.set_size(name, int(value))
        buffers = {
            "weights": self._weights,
            "biases": self._biases,
            "position": self._position,
        }
        self._set_buffers(launch, {**buffers, **workspace.buffers})
        return launch

    def _set_buffers(self, launch: Any, buffers: Mapping[str, Tensor | None]) -> None:
        for name, tensor in buffers.items():
            if tensor is not None:
                dtype = torch.int32 if name in INT32_BUFFERS else torch.float32
                dtype = self.dtype if name in WEIGHT_BUFFERS else dtype
                launch.set_buffer(name, address(name, tensor, dtype, self.device), tensor.numel())

    def _run(self, state: BlockState, positions: Positions, buffers: Mapping[str, Tensor | None], **sizes: int) -> None:
        check_plain(state)
        workspace: _Workspace = state.cache
        launch = workspace.launch
        branches = self.branches(state.condition)
        tiles = 0
        if sizes["mode"] != SEQUENTIAL:
            tiles = count_tiles(self.shape, self.dtype, [sample for sample, _, _ in positions], branches)
        rows = len(positions) * branches
        plan, division = self.plan(rows, tiles, branches), self._division(rows)
        geometry = {**asdict(plan), "most_jobs": division.jobs.shape[1], "pairs": division.pairs}
        geometry["early_keys"] = self._early_keys
        shared_bytes = geometry.pop("shared_bytes")
        for name, value in {**geometry, **sizes}.items():
            launch.set_size(name, value)
        launch.set_positions(positions)
        tokens = {"z": state.z, "x": state.x, "log_det": state.token_log_det}
        self._set_buffers(launch, {"work": division.work, "jobs": division.jobs, **tokens, **buffers})
        with self._on_device():
            workspace.barrier.zero_()
            stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else 0
            launch.run(
                dtype=self._dtype_name,
                index=self._index,
                blocks=division.blocks,
                shared_bytes=shared_bytes,
                stream=stream,
            )
