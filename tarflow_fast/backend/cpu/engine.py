"""The `cpu` backend: a flow block's whole token loop in C++ (`csrc/cpu/`), without Python, torch or the GIL.

The engine has threads of its own, by default as many as torch's where there are cores for them. Results depend neither
on their number nor on what else is in the batch. Linear layers and the KV cache have the chosen dtype; the first and
the last layer are fp32 in both.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import host_ops
from ...checks import check_count, short
from ...devices import default_threads
from ...engine.base import EngineBase
from ...engine.contract import BlockState, Condition, Moved, Progress, check_plain, embedding_rows
from ...engine.weights import BlockWeights
from ...engine.windows import Bounds, check_part, check_window, check_windows
from ...errors import BackendError
from ...limits import most_threads
from ...native import CPU_DTYPES, address, choose_instruction_set, load_native


def cpu_missing(dtype: torch.dtype = torch.float32, compile: bool = False) -> str | None:
    """Returns why this engine cannot serve such a request, and what would mend that, or None if it can.

    Raises BackendError if TARFLOW_FAST_CPU_ISA names instructions that this machine lacks: that is a mistake, and no
    reason to fall back.
    """
    try:
        load_native()
    except BackendError as error:
        return str(error)
    choose_instruction_set()
    if dtype not in CPU_DTYPES:
        return f"the native CPU engine has no {short(dtype)}; use float32 or bfloat16, or backend='torch'"
    if compile:
        return (
            "torch.compile has nothing to compile in the native CPU engine; leave compile out, or use backend='torch'"
        )
    return None


@dataclass
class _Cache:
    rows: int  # R = B, or 2B when guided (conditional branch first)
    keys_values: Tensor  # (R · elements,), laid out by the kernels
    embedding: Tensor | None  # (R, channel_stride) fp32
    guidance: Tensor | None  # (T − 1,) fp32, g_i, or None without guidance


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _addresses(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: address(name, tensor, torch.float32) for name, tensor in tensors.items()}


class CpuEngine(EngineBase):
    """A BlockEngine in C++.

    dtype: the dtype of weights and KV cache, float32 or bfloat16. threads: the number of threads, by default
    `default_threads()` at each call. instruction_set: one of `native.instruction_sets()`, by default see
    `native.choose_instruction_set`.
    """

    def __init__(
        self,
        weights: BlockWeights,
        *,
        dtype: torch.dtype,
        threads: int | None = None,
        instruction_set: str | None = None,
    ):
        missing = cpu_missing(dtype)
        if missing is not None:
            raise BackendError(missing)
        self.shape, self.device, self.dtype = weights.shape, torch.device("cpu"), dtype
        self.threads = None if threads is None else check_count("threads", threads, high=most_threads())
        self.instruction_set = choose_instruction_set(instruction_set)
        self._classes = None if weights.classes is None else weights.classes.float().cpu()
        shape = self.shape
        names = ("proj_in_weight", "proj_in_bias", "position", "proj_out_weight", "proj_out_bias")
        ends = {name: _plain(getattr(weights, name)) for name in names}
        layer: dict[str, Tensor] = {}

        def layer_addresses(i: int) -> dict[str, int]:
            layer.clear()  # only one layer of a bf16 model is copied to fp32 at a time
            layer.update({name: _plain(tensor) for name, tensor in vars(weights.layers[i]).items()})
            return _addresses(layer)

        self._native: Any = load_native().Engine(
            sizes=shape.native,
            weights=_addresses(ends),
            layer=layer_addresses,
            bf16=dtype == torch.bfloat16,
            instruction_set=self.instruction_set,
        )

    @property
    def packed_bytes(self) -> int:
        """Returns the bytes of memory that the packed weights take."""
        return int(self._native.packed_bytes)

    ragged = True  # each sample may have a window of its own

    def begin(self, z: Tensor, condition: Condition, reuse: BlockState | None = None) -> BlockState:
        shape = self.shape
        z = self.latents(z, torch.float32)
        B, T, _ = z.shape
        R = self.branches(condition) * B
        embedding = guidance = None
        if self._classes is not None:
            rows = embedding_rows(condition, B, shape.classes, torch.device("cpu"))
            embedding = torch.zeros(R, self._native.channel_stride, dtype=torch.float32, device="cpu")
            embedding[:, : shape.channels] = host_ops.rows_of(self._classes, rows)
        if condition.guidance.active:
            guidance = torch.tensor(condition.guidance.schedule(T), dtype=torch.float32, device="cpu")
        elements = R * self._native.cache_elements
        if reuse is not None and reuse.cache.keys_values.numel() == elements:
            keys_values = reuse.cache.keys_values
        else:
            keys_values = torch.empty(elements, dtype=self.dtype, device="cpu")
            load_native().prefer_huge_pages(address("cache", keys_values, self.dtype), keys_values.nbytes)
        cache = _Cache(R, keys_values, embedding, guidance)
        return self.state(z, host_ops.copy(z), condition, cache, keys_values.nbytes)

    def bytes_per_sample(self, guided: bool) -> int:
        shape = self.shape
        row = self._native.cache_elements * self.dtype.itemsize + 16 * shape.channels * 4
        return (2 if guided else 1) * row + 4 * shape.tokens * shape.token_dim * 4

    def schedule(self, samples: int, guided: bool = False) -> dict[str, float]:
        """Returns how a sequential pass of so many samples is divided, and what the model of the machine expects.

        teams, team_size: teams of threads, and the threads of a team. group_rows: rows that a team takes through all
        tokens at a time. tile_rows: rows whose sums stay in registers. near_bytes: of weights that stay in L1.
        products, attention, waiting: seconds.
        """
        threads, tokens = self.threads or default_threads(), self.shape.tokens
        return dict(self._native.schedule(samples=samples, tokens=tokens, guided=guided, threads=threads))

    def reverse(
        self, state: BlockState, progress: Progress | None = None, start: int = 1, stop: int | None = None
    ) -> None:
        B, T, _ = state.x.shape
        stop = T if stop is None else stop
        check_part(start, stop, T)
        self._run(state, [start] * B, [stop] * B, None, progress)

    def fixed_point(self, state: BlockState, start: Bounds, stop: Bounds) -> Moved:
        B, T, _ = state.x.shape
        if isinstance(start, int) or isinstance(stop, int):
            first, end = check_window(start, stop, T)
            start, stop = [first] * B, [end] * B
        starts, stops = map(list, check_windows(start, stop, B, T))
        widest = max(map(operator.sub, stops, starts), default=0)
        moved = Moved(*(state.x.new_empty(B, widest) for _ in Moved._fields))
        self._run(state, starts, stops, moved, None)
        return moved

    def _run(
        self, state: BlockState, starts: list[int], stops: list[int], moved: Moved | None, progress: Progress | None
    ) -> None:
        """Make the tokens [starts[b], stops[b]) of state.x.

        They are made all at once if `moved` is given, which is filled. Otherwise they are made one after the other, and
        all samples have the same window.
        """
        cache, guidance = state.cache, state.condition.guidance
        check_plain(state)
        if starts == stops:  # a single token passes unchanged
            return
        (B, T, D), R, fp32 = state.x.shape, cache.rows, torch.float32

        def optional(name: str, tensor: Tensor | None, count: int) -> int:
            return 0 if tensor is None else address(name, tensor, fp32, count=count)

        change, residual = (None, None) if moved is None else moved
        widest = 0 if moved is None else moved.change.shape[1]
        self._native.run(
            z=address("state.z", state.z, fp32, count=B * T * D),
            x=address("state.x", state.x, fp32, count=B * T * D),
            token_log_det=address("state.token_log_det", state.token_log_det, fp32, count=B * T),
            start=starts,
            stop=stops,
            change=optional("change", change, B * widest),
            residual=optional("residual", residual, B * widest),
            widest=widest,
            keys_values=address("cache", cache.keys_values, self.dtype, count=R * self._native.cache_elements),
            embedding=optional("embedding", cache.embedding, R * self._native.channel_stride),
            guidance=optional("guidance", cache.guidance, T - 1),
            guide_a="a" in guidance.what,
            guide_b="b" in guidance.what,
            unguided_scale=1 / guidance.attn_temp,
            sequential=moved is None,
            threads=self.threads or default_threads(),
            progress=progress,
        )
