"""Masked autoregressive transforms in PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...engine.contract import BlockState, Moved
from ...engine.masked import MaskedEngine
from ...masked.sorting import SortedTransform
from ...masked.stepping import Memory, context_rows


class TorchMaskedEngine(MaskedEngine):
    """A `BlockEngine` of a masked transform in PyTorch. transform: the transform, sorted."""

    def __init__(self, transform: SortedTransform):
        weight = transform.layers[0].weight
        super().__init__(transform, weight.dtype, weight.device)

    @torch.no_grad()
    def memory(self, batch: int, context: Tensor | None) -> tuple[Memory, int]:
        """Returns the memory of a batch's units, and how many bytes that is."""
        like = self.transform.layers[0].weight
        memory = Memory(self.transform, context_rows(self.transform, context), batch, like)
        return memory, memory.bytes

    @torch.no_grad()
    def solve(self, state: BlockState, first: int, stop: int) -> None:
        """Make the dimensions [first, stop) known, one step after the other."""
        t, memory = self.transform, state.cache
        z, x, log = state.z[:, 1:, 0], state.x[:, 1:, 0], state.token_log_det[:, 1:]
        self._make_known(state, first, first)
        for step in range(t.step_of(first), t.step_of(stop - 1) + 1):
            low, high = max(first, t.begin[step]), min(stop, t.begin[step + 1])
            moved = max(low, t.passed)
            if low < min(moved, high):
                x[:, low:moved], log[:, low:moved] = z[:, low:moved], 0
            parameters = self._parameters(memory, step, moved, high)
            if moved < high:
                x[:, moved:high], log[:, moved:high] = t.univariate.inverse(z[:, moved:high], parameters)
            memory.put(0, low, x[:, low:high])

    @torch.no_grad()
    def guess(self, state: BlockState, first: int, stop: int) -> Moved:
        """Make the dimensions [first, stop) from those of all steps before theirs as they stand."""
        t, memory = self.transform, state.cache
        z, x, log = state.z[:, 1:, 0], state.x[:, 1:, 0], state.token_log_det[:, 1:]
        step, last = t.step_of(first), t.step_of(stop - 1)
        self._make_known(state, first, stop)
        change, residual = z.new_zeros(len(z), stop - first), z.new_zeros(len(z), stop - first)
        moved = max(first, t.passed)
        if first < min(moved, stop):
            part = slice(first, min(moved, stop))
            change[:, : part.stop - first] = residual[:, : part.stop - first] = (z[:, part] - x[:, part]).abs()
            x[:, part], log[:, part] = z[:, part], 0
        # Every parameter is read off together; those of dimensions outside [first, stop) are left out.
        begin = max(t.begin[step], t.passed)
        found = self._per_dimension(memory.evaluate(step, last + 1))
        if moved < stop:
            parameters = found[:, moved - begin : stop - begin]
            old = x[:, moved:stop].clone()
            new, slopes = t.univariate.inverse(z[:, moved:stop], parameters)
            forward, _ = t.univariate.forward(old, parameters)
            change[:, moved - first :] = (new - old).abs()
            residual[:, moved - first :] = (forward - z[:, moved:stop]).abs()
            x[:, moved:stop], log[:, moved:stop] = new, slopes
        return Moved(change, residual)

    def _make_known(self, state: BlockState, first: int, stop: int) -> None:
        """Make the dimensions up to stop known as they stand, from the step before that of `first` on.

        What is final now may have become so since the last pass.
        """
        known = self.transform.begin[max(self.transform.step_of(first) - 1, 0)]
        if known < stop:
            state.cache.put(0, known, state.x[:, 1 + known : 1 + stop, 0])

    def _parameters(self, memory: Memory, step: int, low: int, high: int) -> Tensor:
        """Returns the parameters of the dimensions [low, high) of a step, (B, n, P)."""
        begin = max(self.transform.begin[step], self.transform.passed)
        return self._per_dimension(memory.evaluate(step, step + 1))[:, low - begin : high - begin]

    def _per_dimension(self, parameters: Tensor) -> Tensor:
        P = self.transform.univariate.parameters
        return parameters.unflatten(-1, (parameters.shape[-1] // P, P))
