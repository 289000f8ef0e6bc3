"""Red zones: memory round every buffer that nobody may write to, and whose values nobody may use."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..checks import short

ZONE = 4096  # bytes on each side, a multiple of every alignment that kernels ask for
HELD = 0xFF  # in every byte: NaN in each dtype of floats, -1 in those of integers


class RedZones(TorchFunctionMode):
    """Within this context each tensor that torch allocates for an engine lies between two red zones.

    A kernel that writes beyond a buffer is found by `broken`. One that reads there gets NaN, which is found in its
    results.
    """

    def __init__(self) -> None:
        super().__init__()
        self._zoned: list[tuple[weakref.ref[Tensor], str, Tensor, Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        return self.around(made) if func in _ALLOCATE and _plain(made) else made

    def around(self, tensor: Tensor) -> Tensor:
        """Returns a copy of the tensor between red zones."""
        memory = torch.full((tensor.nbytes + 2 * ZONE,), HELD, dtype=torch.uint8, device=tensor.device)
        inner = memory[ZONE : ZONE + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        inner.copy_(tensor)
        name = f"the buffer {tuple(tensor.shape)} of {short(tensor.dtype)}"
        self._zoned.append((weakref.ref(inner), name, memory[:ZONE], memory[ZONE + tensor.nbytes :]))
        return inner

    def broken(self) -> str | None:
        """Returns which buffer's zone was written to, or None. Forgets the buffers that are gone."""
        with torch._C.DisableTorchFunctionSubclass():
            found = None
            for _, name, before, after in self._zoned:
                spoilt = [side for side, zone in (("before", before), ("after", after)) if bool((zone != HELD).any())]
                if spoilt and found is None:
                    found = f"a write {' and '.join(spoilt)} {name}"
            self._zoned = [zoned for zoned in self._zoned if zoned[0]() is not None]
            return found


def _plain(made: object) -> bool:
    return isinstance(made, Tensor) and made.layout == torch.strided and made.is_contiguous() and made.numel() > 0


_ALLOCATE = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.empty_like, torch.zeros_like, torch.tensor),
    *(Tensor.clone, Tensor.new_empty, Tensor.new_zeros, Tensor.new_full, torch.clone),
}
